package store

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
)

func TestActsSayWhoDidWhatAndOnlyWhatWasDone(t *testing.T) {
	server := etcdtest.New(t)
	dial := func(by string) *Client {
		c, err := Dial(t.Context(), Config{Endpoints: []string{server.Endpoint()}, By: by})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	alice, nobody := dial("alice@laptop"), dial("")
	ip := netip.MustParseAddr("10.10.0.11")
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	do(alice.Pin(t.Context(), egress.Pin{IP: ip, Node: "node-1"}))
	for range 2 { // the second finds nothing, and does nothing
		_, err := alice.Unpin(t.Context(), ip)
		do(err)
	}
	do(alice.Cordon(t.Context(), egress.Cordon{Node: "node-1"}))
	do(alice.Cordon(t.Context(), egress.Cordon{Node: "node-1", Why: "drain"}))
	all, err := nobody.ReadAll(t.Context())
	do(err)
	if by := all.Cordons["node-1"].By; by != "alice@laptop" {
		t.Errorf("the cordon is of %q", by)
	}
	_, err = alice.Uncordon(t.Context(), "node-1")
	do(err)
	_, err = alice.Uncordon(t.Context(), "node-1")
	do(err)
	request, err := alice.RequestMoves(t.Context(), time.Minute, egress.Move{IP: ip, To: "node-2"})
	do(err)
	if _, err := alice.RequestMoves(t.Context(), time.Minute, egress.Move{IP: ip, To: "node-3"}); err == nil {
		t.Error("two moves of one IP")
	}
	do(nobody.Pin(t.Context(), egress.Pin{IP: ip, Node: "node-9"}))
	do(nobody.Cordon(t.Context(), egress.Cordon{Node: "node-9"}))

	acts, faults, err := nobody.Acts(t.Context())
	do(err)
	var got []string
	for _, a := range acts {
		about := a.Node
		if a.IP.IsValid() {
			about = fmt.Sprint(a.IP, " ", a.Node)
		}
		got = append(got, fmt.Sprintf("%s %s %s", a.By, a.What, strings.TrimSpace(about)))
	}
	want := []string{
		"alice@laptop pin 10.10.0.11 node-1", "alice@laptop unpin 10.10.0.11", "alice@laptop cordon node-1", "alice@laptop drain node-1", "alice@laptop uncordon node-1",
		"alice@laptop move 10.10.0.11 node-2",
	}
	if fmt.Sprint(got) != fmt.Sprint(want) || len(faults) > 0 {
		t.Errorf("acts\n%s\nwant\n%s\n%v", strings.Join(got, "\n"), strings.Join(want, "\n"), faults)
	}
	// Each ends by itself, and what was not done leaves no lease behind: those of the acts and the request.
	leases, err := nobody.Etcd().Leases(t.Context())
	do(err)
	if len(leases.Leases) != len(want)+1 {
		t.Errorf("%d leases, want %d", len(leases.Leases), len(want)+1)
	}
	records, err := nobody.List(t.Context(), ActPrefix)
	do(err)
	for key, r := range records {
		if r.Lease == 0 {
			t.Errorf("%s stays for ever", key)
		}
	}
	do(request.Revoke(t.Context()))
}

func TestAMoveThatCameTrueSaysInTheHistoryWhoAskedForIt(t *testing.T) {
	server := etcdtest.New(t)
	c, err := Dial(t.Context(), Config{Endpoints: []string{server.Endpoint()}, By: "alice@laptop"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ip := netip.MustParseAddr("10.10.0.11")
	leases := map[string]*Lease{}
	for _, node := range []string{"node-1", "node-2"} {
		if leases[node], err = c.Grant(t.Context(), time.Minute); err != nil {
			t.Fatal(err)
		}
		if err := c.PutAgent(t.Context(), leases[node], egress.Agent{Node: node}, whatever); err != nil {
			t.Fatal(err)
		}
	}
	if ok, err := c.Claim(t.Context(), leases["node-1"], egress.Owner{IP: ip, Node: "node-1", Why: egress.ReasonClaim}, Former{}); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if _, err := c.RequestMoves(t.Context(), time.Minute, egress.Move{IP: ip, To: "node-2"}); err != nil {
		t.Fatal(err)
	}
	all, err := c.ReadAll(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if by := all.Moves[ip].By; by != "alice@laptop" {
		t.Errorf("the move was asked for by %q", by)
	}
	if ok, err := c.HandOver(t.Context(), all.Owners[ip], all.Moves[ip], all.Agents["node-2"]); !ok || err != nil {
		t.Fatal(ok, err)
	}
	history, err := c.History(t.Context(), ip)
	if err != nil || len(history) != 2 || history[0].By != "" || history[1].By != "alice@laptop" {
		t.Errorf("history %+v, %v", history, err)
	}
}
