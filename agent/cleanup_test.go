package agent

import (
	"log/slog"
	"strings"
	"testing"

	"github.com/egret-project/egret/internal/netns"
)

func TestCleanupIsRefusedWhileAnAgentRuns(t *testing.T) {
	netns.Enter(t)
	lock, err := lockNode()
	if err != nil {
		t.Fatal(err)
	}
	netns.Run(t, "ip link add egret0 type bridge")
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
	}
}
