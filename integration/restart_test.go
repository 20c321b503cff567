package integration

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestRestartOfAgentsLosesNoPacket(t *testing.T) {
	n := newNamespace(t)
	ip, _, pod := n.remote("restart", "10.10.0.17")
	unmoved(t, ip, pod, 8*time.Second, func() {
		for _, node := range nodes() {
			restart(t, node)
		}
	})
}

// TestAgentsThatAreAwayForHalfAMinuteLoseNoPacket has no agent on any node for most of the time: the kernels serve on.
func TestAgentsThatAreAwayForHalfAMinuteLoseNoPacket(t *testing.T) {
	const away = 30 * time.Second // as long as a new image may take
	n := newNamespace(t)
	ip, _, pod := n.remote("away", "10.10.0.62")
	unmoved(t, ip, pod, away+8*time.Second, func() {
		var back []time.Time
		for _, node := range nodes() {
			if err := cluster.Stop(t.Context(), "agent", node); err != nil {
				t.Fatal(err)
			}
			back = append(back, time.Now().Add(away))
		}
		for i, node := range nodes() {
			time.Sleep(time.Until(back[i])) // it is what is tested
			if err := cluster.Start(t.Context(), "agent", node); err != nil {
				t.Fatal(err)
			}
		}
	})
	for _, node := range nodes() {
		inService(t, node, false)
	}
}

// TestKilledAgentsThatComeBackAtOnceLoseNoPacket: with the gossip, at once means before the permits end and the others take over.
func TestKilledAgentsThatComeBackAtOnceLoseNoPacket(t *testing.T) {
	n := newNamespace(t)
	ip, _, pod := n.remote("killed", "10.10.0.63")
	unmoved(t, ip, pod, 8*time.Second, func() {
		for _, node := range nodes() {
			if err := cluster.Kill(t.Context(), "agent", node); err != nil {
				t.Fatal(err)
			}
			if err := cluster.Start(t.Context(), "agent", node); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
	})
}

// TestWithoutGossipKilledAgentsThatComeBackWithinTheLeaseLoseNoPacket: nobody can take over before the lease ends, so the permits last as long.
func TestWithoutGossipKilledAgentsThatComeBackWithinTheLeaseLoseNoPacket(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("lease", "10.10.0.64")
	silent := filepath.Join(t.TempDir(), "egret")
	if err := os.WriteFile(silent, []byte(fmt.Sprintf("#!/bin/sh\nexec %s \"$@\" --gossip-key-file=\n", cluster.EgretPath())), 0o755); err != nil {
		t.Fatal(err)
	}
	renewAfter(t)
	begin := func(node string) {
		t.Helper()
		if err := cluster.Upgrade(context.Background(), node, silent); err != nil {
			t.Fatal(err)
		}
		inService(t, node, false)
	}
	for _, node := range nodes() {
		begin(node)
	}
	unmoved(t, ip, pod, 8*time.Second, func() {
		for range 2 {
			if err := cluster.Kill(t.Context(), "agent", gateway); err != nil {
				t.Fatal(err)
			}
			time.Sleep(leaseTTL / 2) // it is what is tested
			begin(gateway)
			time.Sleep(time.Second)
		}
	})
}

// unmoved has a probe sent from the pod while f happens, and wants no packet lost, and every IP where it was.
func unmoved(t *testing.T, ip netip.Addr, pod string, d time.Duration, f func()) {
	t.Helper()
	owners := ownership(t)
	result := probe(t, pod, d, f)
	only(t, result, ip)
	lossless(t, "meanwhile", result)
	if after := ownership(t); !maps.Equal(owners, after) {
		t.Errorf("owners before %v, after %v", owners, after)
	}
}
