package agent

import (
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
)

// What the kernel has tells an agent that starts which pods it is not to add, or to take out.
func TestThePodsOfTheKernelDecideWhereNotAllIsKnown(t *testing.T) {
	netns.Enter(t)
	cfg := Config{Node: "a", Log: slog.New(slog.DiscardHandler), Timing: Timing{Permit: time.Second, LeaseTTL: time.Minute}, Network: Network{ShareTables: true}}
	k, err := openKernel(cfg, newMachine(ownership.Config{Node: "a", Permit: time.Second}), nil, func() {})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.tables.Close() })
	stays, ends, next := netip.MustParseAddr("10.244.0.5"), netip.MustParseAddr("fd44::6"), netip.MustParseAddr("10.244.0.7")
	type pods = map[netip.Addr]egress.ID
	unread := &plan.Unread{Pods: map[netip.Addr]bool{stays: true, ends: true}}
	for _, step := range []struct {
		name string
		d    plan.Desired
		want pods
	}{
		{"all is known", plan.Desired{NFT: nft.State{Pods: pods{stays: 7, ends: 8}}}, pods{stays: 7, ends: 8}},
		{"a record cannot be read", plan.Desired{NFT: nft.State{Keep: true}, Unread: unread}, pods{stays: 7, ends: 8}},
		{"pods of a node are not known", plan.Desired{NFT: nft.State{Pods: pods{stays: 7, next: 7}}, Unknown: []string{"b"}}, pods{stays: 7}},
		{"they are", plan.Desired{NFT: nft.State{Pods: pods{stays: 7, next: 7}}}, pods{stays: 7, next: 7}},
	} {
		if applied, err := k.program(t.Context(), step.d); !applied || err != nil {
			t.Fatal(step.name, applied, err)
		}
		tables, err := k.tables.Observe()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(step.want, tables.Pods(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("%s: pods (-want +got):\n%s", step.name, diff)
		}
	}
}
