package nft

import (
	"fmt"
	"strings"
	"testing"

	"github.com/egret-project/egret/internal/netns"
)

// Each hook of a link takes 1,024 chains, so that one where there are so many takes no other, as that of a kernel
// without it.
func TestAKernelThatTakesNotAllOfTheTablesIsFoundBeforeTheyAreWritten(t *testing.T) {
	tables := open(t)
	generation := func() uint32 {
		n, err := tables.read.generation()
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := generation()
	if err := Check(); err != nil {
		t.Errorf("this kernel: %v", err)
	}
	if out := netns.Run(t, "nft list ruleset"); out != "" || generation() != before {
		t.Errorf("the check leaves, or commits:\n%s", out)
	}
	var full strings.Builder
	for i := range 1024 {
		fmt.Fprintf(&full, "add chain netdev full c%d { type filter hook egress device lo priority 0; }\n", i)
	}
	nft(t, "add table netdev full\n"+full.String())
	before = generation()
	err := Check()
	if err == nil || strings.Count(err.Error(), "kernel without") != 1 {
		t.Fatalf("error %v, want one that names one thing", err)
	}
	for _, part := range []string{"Linux 5.16 with CONFIG_NETFILTER_EGRESS", "add chain netdev egret-check", `hook egress device "lo"`} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
		}
	}
	if out := strings.TrimSpace(netns.Run(t, "nft list tables")); out != "table netdev full" || generation() != before {
		t.Errorf("the check leaves, or commits:\n%s", out)
	}
}
