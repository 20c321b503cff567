package store

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
)

// A view that took in changes one by one holds what is read at once.
func TestAWholeViewIsWhatIsReadAtOnce(t *testing.T) {
	c := dial(t, etcdtest.New(t))
	block := egress.Block{IP: ip1, First: 2048, Size: 1024, Node: "n1", Since: noon}
	unselected := members(egress.Unselected, "n1", "10.244.1.3")
	tenure := egress.Tenure{IP: ip1, Node: "n1", Since: noon, Why: egress.ReasonClaim}
	records := map[string]any{
		PoolKey("p"): pool, EgressKey("e"): policy, NodeKey("n1"): node, AgentKey("n1"): agent, OwnerKey(ip1): owner, MoveKey(ip1): move, PinKey(ip6): pin,
		CordonKey("n2"): cordon, AllocationKey(ip1): alloc, BlockKey(ip1, 2048): block, MembersByEgressKey("e", "n1"): members("e", "n1", "10.244.1.2"),
		MembersByNodeKey("n1", "e"): members("e", "n1", "10.244.1.2"), MembersByNodeKey("n1", egress.Unselected): unselected,
		CrdsyncElection.prefix() + "1": "first", CrdsyncElection.prefix() + "2": "second", HistoryKey(tenure): tenure,
	}
	keys := slices.Sorted(func(yield func(string) bool) {
		for k := range records {
			if !yield(k) {
				return
			}
		}
	})
	v := c.NewWholeView()
	if _, _, ok := v.Whole(); ok {
		t.Error("a whole before anything was listed")
	}
	background(t, v.Run)
	random := rand.New(rand.NewPCG(1, 2))
	there := map[string]bool{}
	for range 60 {
		switch key := keys[random.IntN(len(keys))]; {
		case there[key]:
			del(t, c, key)
			there[key] = false
		default:
			put(t, c, key, records[key])
			there[key] = true
		}
		want, err := c.ReadWhole(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var got Whole
		var tenures []egress.Tenure
		for end := time.Now().Add(deadline); got.Revision < want.Revision; time.Sleep(time.Millisecond) {
			if got, tenures, _ = v.Whole(); time.Now().After(end) {
				t.Fatalf("the view is at revision %d, etcd at %d", got.Revision, want.Revision)
			}
		}
		ignore := []cmp.Option{cmpopts.EquateEmpty(), cmpopts.EquateComparable(ip1, node.PodCIDRs[0]), cmpopts.IgnoreFields(egress.Snapshot{}, "Restores")}
		if diff := cmp.Diff(want, got, ignore...); diff != "" {
			t.Fatalf("(-read +followed):\n%s", diff)
		}
		if there[HistoryKey(tenure)] != (len(tenures) == 1) {
			t.Fatalf("tenures: %v, want that of etcd", tenures)
		}
	}
	// A record that cannot be read is a fault, and what it was stands.
	for _, tt := range []struct {
		record any
		faults int
	}{{block, 0}, {"{", 1}} {
		put(t, c, BlockKey(ip1, 2048), tt.record)
		for end := time.Now().Add(deadline); ; time.Sleep(time.Millisecond) {
			if w, _, _ := v.Whole(); len(w.Faults) == tt.faults && len(w.Blocks) == 1 {
				break
			} else if time.Now().After(end) {
				t.Fatalf("faults %v, blocks %v", w.Faults, w.Blocks)
			}
		}
	}
}
