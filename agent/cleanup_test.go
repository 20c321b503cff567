package agent

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/egret-project/egret/internal/netns"
)

func TestCleanupIsRefusedWhileAnAgentRuns(t *testing.T) {
	netns.Enter(t)
	lock, err := lockNode(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	netns.Run(t, "ip link add egret0 type bridge")
	filtered(t)
	if err := Cleanup("", slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("error %v, want one that says what to do", err)
	}
	netns.Run(t, "ip link show egret0")
	lock.Close()
	for range 2 {
		if err := Cleanup("", slog.New(slog.DiscardHandler)); err != nil {
			t.Error(err)
		}
		if out := netns.Run(t, "ip -br link") + netns.Run(t, "nft list ruleset"); strings.Contains(out, "egret") {
			t.Errorf("left behind:\n%s", out)
		}
		if out := netns.Run(t, "tc filter show dev pod0 egress"); out != "" {
			t.Errorf("a filter is left behind:\n%s", out)
		}
	}
}

// filtered makes a link of a pod with what an agent leaves there that is killed while it sends in the pod's name.
func filtered(t *testing.T) {
	t.Helper()
	for _, line := range []string{
		"ip link add pod0 type bridge", "tc qdisc add dev pod0 clsact",
		"tc filter add dev pod0 egress pref 59879 protocol ipv6 u32 match ip6 src fd44::5 action mirred ingress redirect dev pod0",
	} {
		netns.Run(t, line)
	}
	if out := netns.Run(t, "tc filter show dev pod0 egress"); !strings.Contains(out, "59879") {
		t.Fatalf("the filter is not there:\n%s", out)
	}
}

func TestAnAgentDeletesTheFilterThatAKilledOneLeft(t *testing.T) {
	c := newEtcd(t)
	netns.Enter(t) // last: etcd and its client live outside
	filtered(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // before it has a lease
	if err := Run(ctx, Config{Node: "n1", Store: c, Log: slog.New(slog.DiscardHandler)}); !errors.Is(err, context.Canceled) {
		t.Errorf("it ended with %v", err)
	}
	if out := netns.Run(t, "tc filter show dev pod0 egress"); out != "" {
		t.Errorf("left behind:\n%s", out)
	}
}
