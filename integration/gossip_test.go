package integration

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestPowerOffOfTheOwnerIsNoticedByTheGossip(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("gossip", "10.10.0.40")
	home := otherNode(gateway) // of the pod
	var gaps []time.Duration
	for range 3 {
		time.Sleep(3 * time.Second) // the agents know each other, and probe
		result := probe(t, pod, 4*time.Second, func() {
			if err := cluster.Crash(t.Context(), gateway); err != nil {
				t.Fatal(err)
			}
		})
		_, heir := held(t, "gossip")
		if err := cluster.Recover(t.Context(), gateway); err != nil {
			t.Fatalf("recovering %s: %v", gateway, err)
		}
		if only(t, result, ip); heir == gateway {
			t.Fatalf("%s still holds %s", gateway, ip)
		}
		gaps = append(gaps, result.LongestGap)
		if heir == home { // the next one to go must not take the pod along
			time.Sleep(2 * time.Second)
			egret(t, "move", ip.String(), "--to", gateway)
		} else {
			gateway = heir
		}
	}
	slices.Sort(gaps)
	t.Logf("power-off to the first packet: %v", gaps)
	if gaps[len(gaps)-1] > 2500*time.Millisecond {
		t.Errorf("gaps of %v, want 1.5s, 2.5s on a busy machine", gaps)
	}
}

func TestLossOfEtcdLosesNoPacketAndMovesNothing(t *testing.T) {
	const outage = 30 * time.Second
	n := newNamespace(t)
	ip, _, pod := n.remote("loss", "10.10.0.97")
	time.Sleep(2 * time.Second)
	owners := ownership(t)
	logs := map[string][]byte{}
	for _, node := range nodes() {
		logs[node] = agentLog(t, node)
	}
	result := probe(t, pod, outage+8*time.Second, func() {
		if err := cluster.Stop(t.Context(), "etcd", ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(outage) // it is what is tested
		if err := cluster.Start(t.Context(), "etcd", ""); err != nil {
			t.Fatal(err)
		}
	})
	only(t, result, ip)
	lossless(t, "without etcd", result)
	eventually(t, 5*time.Second, func() error {
		if after := ownership(t); !maps.Equal(owners, after) {
			return fmt.Errorf("owners before %v, after %v", owners, after)
		}
		return nil
	})
	if err := watch.Doubles(); err != nil {
		t.Error(err)
	}
	// One line when etcd was lost, one when it was back.
	for node, before := range logs {
		said := strings.TrimSpace(beside.ReplaceAllString(string(agentLog(t, node)[len(before):]), ""))
		if !regexp.MustCompile(`^[^\n]*level=WARN[^\n]*\n[^\n]*level=INFO[^\n]*$`).MatchString(said) {
			t.Errorf("the agent of %s said\n%s\nwant a line for the loss, and one for the return", node, said)
		}
	}
}

// beside is what an agent may say of a busy machine meanwhile.
var beside = regexp.MustCompile(`(?m)^.*msg="(agent suspected|permits renewed by commits)[^\n]*\n`)

func agentLog(t *testing.T, node string) []byte {
	t.Helper()
	log, err := os.ReadFile(cluster.LogFile("agent-" + node))
	if err != nil {
		t.Fatal(err)
	}
	return log
}
