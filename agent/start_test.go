package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/internal/netns"
)

// A link whose hook has as many chains as it takes, 1,024, is to the agent as one of a kernel without the hook. It went
// on without its tables, and selected pods left with the node's address.
func TestOnAKernelThatLacksSomethingTheAgentEndsAndProgramsNothing(t *testing.T) {
	c := newEtcd(t)
	netns.Enter(t) // last: etcd and its client live outside
	script := []byte("add table netdev full\n")
	for i := range 1024 {
		script = fmt.Appendf(script, "add chain netdev full c%d { type filter hook egress device lo priority 0; }\n", i)
	}
	full := filepath.Join(t.TempDir(), "full.nft")
	if err := os.WriteFile(full, script, 0o600); err != nil {
		t.Fatal(err)
	}
	netns.Run(t, "nft -f "+full)
	kernel := func() (all string) {
		for _, line := range []string{"nft list tables", "ip -br link", "ip rule", "ip -6 rule", "ip route show table all"} {
			all += netns.Run(t, line)
		}
		return all
	}
	before := kernel()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	err := Run(ctx, Config{Node: "n1", Store: c, Log: slog.New(slog.DiscardHandler), Timing: Timing{LeaseTTL: 10 * time.Second, Permit: time.Second, RestartGrace: 10 * time.Second}})
	if err == nil || !strings.Contains(err.Error(), "hook egress") || !strings.Contains(err.Error(), "Linux 5.16 with CONFIG_NETFILTER_EGRESS") {
		t.Errorf("it ended with %v, want an error that says what is missing, and what has it", err)
	}
	if after := kernel(); after != before {
		t.Errorf("the kernel had\n%s\nand has\n%s", before, after)
	}
	if a, err := c.Agent(t.Context(), "n1"); err != nil || a.Lease != "" {
		t.Errorf("etcd has %+v, %v: want nothing of that agent", a, err)
	}
}
