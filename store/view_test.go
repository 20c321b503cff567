package store

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
)

var (
	noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
	ip1  = addr("10.0.0.1")
	ip2  = addr("10.0.0.2")
	ip6  = addr("fd10::1")

	pool   = egress.Pool{Name: "p", Ranges: []egress.Range{{Start: ip1, End: addr("10.0.0.9")}}, Subnet: &egress.Subnet{Gateway: ip1, PrefixLength: 24, VLAN: 7}}
	policy = egress.Policy{Name: "e", Addresses: []egress.Address{{IP: ip1, ID: 1, Pool: "p"}, {IP: ip6, ID: 2, Pool: "p6"}}, Created: noon, Generation: 1}
	node   = egress.Node{Name: "n1", Index: 1, Addresses: []netip.Addr{addr("192.168.0.1")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}}
	agent  = egress.Agent{Node: "n1", Address: addr("192.168.0.1"), Lease: egress.FormatLease(7), Version: "v", Since: noon}
	owner  = egress.Owner{IP: ip1, Node: "n1", Since: noon, Why: egress.ReasonClaim}
	move   = egress.Move{IP: ip1, To: "n2", Since: noon}
	pin    = egress.Pin{IP: ip6, Node: "n1"}
	cordon = egress.Cordon{Node: "n2", Since: noon}
	alloc  = egress.Allocation{IP: ip1, Pool: "p", ID: 1, Egresses: []string{"e"}, Since: noon}
)

func members(e, n, ip string) egress.Members {
	return egress.Members{Egress: e, Node: n, Pods: []egress.Member{{Pod: "default/" + e, IPs: []netip.Addr{addr(ip)}}}}
}

// viewed returns the running view of node n1, listed already.
func viewed(t *testing.T, c *Client) *View {
	t.Helper()
	v := c.NewView("n1")
	if v.Snapshot() != nil {
		t.Error("a snapshot before anything was listed")
	}
	background(t, v.Run)
	recv(t, "the first list", v.Ready())
	return v
}

// faults returns what a snapshot says of records that cannot be read.
func faults(s *egress.Snapshot) string {
	var out strings.Builder
	for _, f := range s.Faults {
		fmt.Fprintf(&out, "%s: %s\n", f.Key, strings.ReplaceAll(f.Err.Error(), "\n", "; "))
	}
	return out.String()
}

func TestViewHasEveryRecordThatANodeNeedsAndNoOther(t *testing.T) {
	c := dial(t, start(t))
	put(t, c, PoolKey("p"), pool)
	put(t, c, EgressKey("e"), policy)
	put(t, c, NodeKey("n1"), node)
	put(t, c, AgentKey("n1"), agent)
	put(t, c, PinKey(ip6), pin)
	put(t, c, CordonKey("n2"), cordon)
	put(t, c, AllocationKey(ip1), alloc)
	mine, idle := members("e", "n1", "10.244.1.1"), members(egress.Unselected, "n1", "10.244.1.2")
	put(t, c, MembersByNodeKey("n1", "e"), mine)
	put(t, c, MembersByNodeKey("n1", egress.Unselected), idle)
	put(t, c, MembersByNodeKey("n2", "e"), members("e", "n2", "10.244.2.1"))
	put(t, c, MembersByEgressKey("e", "n1"), mine)
	l := grant(t, c, time.Minute)
	if ok, err := c.Claim(t.Context(), l, owner, Former{}); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if _, err := c.RequestMoves(t.Context(), time.Minute, move); err != nil {
		t.Fatal(err)
	}
	got := *viewed(t, c).Snapshot()

	// What comes with the keys is not known beforehand; it is there, and the owner's is the lease's.
	o, m := got.Owners[ip1], got.Moves[ip1]
	if o.Lease != l.ID() || o.Revision == 0 || m.Lease == 0 || m.Revision != o.Revision+1 || got.Revision != m.Revision {
		t.Errorf("lease %x, owner %+v, move %+v, snapshot of %d", l.ID(), o, m, got.Revision)
	}
	wantOwner, wantMove := owner, move
	wantOwner.Lease, wantOwner.Revision, wantMove.Lease, wantMove.Revision = o.Lease, o.Revision, m.Lease, m.Revision
	want := egress.Snapshot{
		Revision: got.Revision,
		Pools:    map[string]egress.Pool{"p": pool}, Egresses: map[string]egress.Policy{"e": policy},
		Nodes: map[string]egress.Node{"n1": node}, Agents: map[string]egress.Agent{"n1": agent},
		Owners: map[netip.Addr]egress.Owner{ip1: wantOwner}, Moves: map[netip.Addr]egress.Move{ip1: wantMove},
		Pins: map[netip.Addr]egress.Pin{ip6: pin}, Cordons: map[string]egress.Cordon{"n2": cordon},
		ByNode:   map[string]egress.Members{"e": mine, egress.Unselected: idle},
		ByEgress: map[string]map[string]egress.Members{}, Followed: map[string]bool{},
	}
	if diff := cmp.Diff(want, got, compare); diff != "" {
		t.Errorf("snapshot (-want +got):\n%s", diff)
	}

	all, err := c.ReadAll(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want.ByNode, want.Followed = nil, nil
	if diff := cmp.Diff(Everything{want, []egress.Allocation{alloc}}, all, compare); diff != "" {
		t.Errorf("everything (-want +got):\n%s", diff)
	}
}

func TestRecordsThatCannotBeReadAreFaultsAndTheOthersServe(t *testing.T) {
	c := dial(t, start(t))
	for key, v := range map[string]any{
		PoolKey("p"):                            egress.Pool{Name: "p", Ranges: []egress.Range{{Start: ip2, End: ip1}}},
		PoolKey("vlan"):                         egress.Pool{Name: "vlan", Subnet: &egress.Subnet{Gateway: ip1, PrefixLength: 24, VLAN: 4095}},
		EgressKey("e"):                          egress.Policy{Name: "e", Addresses: []egress.Address{{IP: ip1}}},
		EgressKey("two"):                        egress.Policy{Name: "two", Addresses: []egress.Address{{IP: ip1, ID: 1}, {IP: ip2, ID: 2}}},
		NodeKey("n1"):                           egress.Node{Name: "n1"},
		NodeKey("n2"):                           `{"name":"n2","index":2,"addresses":["192.168.0.300"]}`,
		AgentKey("n1"):                          egress.Agent{Node: "n2"},
		OwnerKey(ip1):                           owner, // the only good one
		OwnerKey(ip2):                           owner,
		OwnerPrefix + "10.0.0.03":               owner,
		OwnerPrefix + "::ffff:10.0.0.1":         owner,
		MoveKey(ip1):                            egress.Move{IP: ip1},
		PinKey(ip1):                             "null",
		CordonKey("n1"):                         "",
		MembersByNodeKey("n1", "e"):             members("e", "n2", "10.244.1.1"),
		MembersByNodeKey("n1", "x") + "/y":      members("x", "n1", "10.244.1.1"),
		MembersByNodeKey("n1", "v"):             `{"egress":"v","node":"n1","pods":[{"pod":"a/b","ips":[""]}]}`,
		MembersByEgressKey("unfollowed", "n1"):  "{",
		AllocationPrefix + "not seen by a view": "{",
	} {
		put(t, c, key, v)
	}
	s := viewed(t, c).Snapshot()
	want := `agents/n1: key and value disagree: the key says n1, node is n2
cordons/n1: decoding egress.Cordon: unexpected end of JSON input
egresses/e: id 0: want 1 to 65535
egresses/two: ip 10.0.0.2 is the second of its family
members/by-node/n1/e: key and value disagree: the key says n1, node is n2
members/by-node/n1/v: IP of pod a/b "invalid IP": want an IPv4 or IPv6 address, without a zone
members/by-node/n1/x/y: key ends in "x/y": want a name
moves/10.0.0.1: to is empty
nodes/n1: index 0: want 1 to 65535
nodes/n2: decoding egress.Node: ParseAddr("192.168.0.300"): IPv4 field has value >255
owners/10.0.0.03: key ends in "10.0.0.03": want an IPv4 or IPv6 address in its usual form
owners/10.0.0.2: key and value disagree: the key says 10.0.0.2, ip is 10.0.0.1
owners/::ffff:10.0.0.1: key ends in "::ffff:10.0.0.1": want an IPv4 or IPv6 address in its usual form
pins/10.0.0.1: key and value disagree: the key says 10.0.0.1, ip is invalid IP; node is empty
pools/p: range 10.0.0.2-10.0.0.1: want a start that is not after the end, of the same family
pools/vlan: VLAN id 4095: want 0 to 4094
`
	if diff := cmp.Diff(want, faults(s)); diff != "" {
		t.Errorf("faults (-want +got):\n%s", diff)
	}
	if s.Owners[ip1].Node != "n1" || len(s.Owners)+len(s.Pools)+len(s.Egresses)+len(s.Nodes)+len(s.Agents)+len(s.ByNode) != 1 {
		t.Errorf("read: %+v", s)
	}
	all, err := c.ReadAll(t.Context())
	if err != nil || !strings.Contains(faults(&all.Snapshot), "allocations/not seen by a view: ") {
		t.Errorf("everything: %v, %s", err, faults(&all.Snapshot))
	}
}

func TestTheLastValueThatCouldBeReadStands(t *testing.T) {
	c := dial(t, start(t))
	put(t, c, EgressKey("e"), policy)
	v := viewed(t, c)
	put(t, c, EgressKey("e"), "{")
	until(t, "the fault", v.Changed(), func() bool { return faults(v.Snapshot()) != "" })
	if diff := cmp.Diff(policy, v.Snapshot().Egresses["e"], compare); diff != "" {
		t.Errorf("egress with a fault (-want +got):\n%s", diff)
	}
	better := policy
	better.Generation = 2
	put(t, c, EgressKey("e"), better)
	until(t, "the mended record", v.Changed(), func() bool { return v.Snapshot().Egresses["e"].Generation == 2 })
	if got := faults(v.Snapshot()); got != "" {
		t.Errorf("faults that stay: %s", got)
	}
	put(t, c, EgressKey("e"), "{")
	until(t, "the fault", v.Changed(), func() bool { return faults(v.Snapshot()) != "" })
	del(t, c, EgressKey("e"))
	until(t, "the end of record and fault", v.Changed(), func() bool { return faults(v.Snapshot()) == "" })
	if got := v.Snapshot().Egresses; len(got) != 0 {
		t.Errorf("deleted: %v", got)
	}
}

// What the kernel has of it from before would go.
func TestARecordThatIsWrittenAnewAndStillCannotBeReadIsBlindStill(t *testing.T) {
	c := dial(t, start(t))
	put(t, c, EgressKey("e"), "{")
	v := viewed(t, c)
	for _, step := range []struct {
		value any
		blind bool
	}{{"{", true}, {"[", true}, {policy, false}, {"{", false}} {
		rev := put(t, c, EgressKey("e"), step.value)
		until(t, "the record", v.Changed(), func() bool { return v.Snapshot().Revision >= rev })
		s := v.Snapshot()
		if blind := len(s.Faults) == 1 && s.Faults[0].Blind; blind != step.blind {
			t.Errorf("%v: faults %+v, want blind %t", step.value, s.Faults, step.blind)
		}
	}
}

func TestSnapshotsNeverChangeAndAreOneWhileNothingDoes(t *testing.T) {
	c := dial(t, start(t))
	put(t, c, EgressKey("e"), policy)
	put(t, c, MembersByEgressKey("e", "n1"), members("e", "n1", "10.244.1.1"))
	v := viewed(t, c)
	v.Watch(Scope{Egresses: []string{"e"}})
	until(t, "the members", v.Changed(), func() bool { return len(v.Snapshot().ByEgress["e"]) == 1 })
	first := v.Snapshot()
	if again := v.Snapshot(); again != first {
		t.Error("another snapshot though nothing changed")
	}
	before, err := Encode(first.Egresses)
	if err != nil {
		t.Fatal(err)
	}
	put(t, c, EgressKey("f"), egress.Policy{Name: "f"})
	put(t, c, MembersByEgressKey("e", "n2"), members("e", "n2", "10.244.2.1"))
	del(t, c, EgressKey("e"))
	until(t, "the changes", v.Changed(), func() bool { _, ok := v.Snapshot().Egresses["e"]; return !ok })
	second := v.Snapshot()
	if after, _ := Encode(first.Egresses); string(after) != string(before) || len(first.ByEgress["e"]) != 1 {
		t.Errorf("the first snapshot has changed: %s, %v", after, first.ByEgress)
	}
	if len(second.ByEgress["e"]) != 2 || len(second.Egresses) != 1 || second.Revision <= first.Revision {
		t.Errorf("the second: %+v", second)
	}
}

func TestFollowBringsMembersAndTakesThemAway(t *testing.T) {
	c := dial(t, start(t))
	names := []string{"e"}
	for n := range 2 * maxTxnOps { // more than one Txn can list
		names = append(names, fmt.Sprintf("e%d", n))
	}
	for _, name := range names {
		put(t, c, MembersByEgressKey(name, "n2"), members(name, "n2", "10.244.2.1"))
	}
	v := viewed(t, c)
	for _, step := range [][]string{{"e"}, names, {"e", "e7", "e"}, {"e7", "e"}, nil} {
		v.Watch(Scope{Egresses: step})
		want := map[string]bool{}
		for _, name := range step {
			want[name] = true
		}
		until(t, fmt.Sprintf("%d egresses", len(want)), v.Changed(), func() bool { return len(v.Snapshot().ByEgress) == len(want) })
		for name := range v.Snapshot().ByEgress {
			if !want[name] {
				t.Errorf("%s is seen", name)
			}
		}
		if diff := cmp.Diff(want, v.Snapshot().Followed); diff != "" {
			t.Errorf("followed (-want +got):\n%s", diff)
		}
	}
	v.Watch(Scope{Egresses: []string{"without"}})
	if v.Snapshot().Followed["without"] {
		t.Error("members are said to be known that nobody has asked for")
	}
	until(t, "to be told that an egress has no members", v.Changed(), func() bool { return v.Snapshot().Followed["without"] })
	v.Watch(Scope{Egresses: []string{"e"}})
	put(t, c, MembersByEgressKey("e", "n3"), members("e", "n3", "10.244.3.1"))
	until(t, "a new node's members", v.Changed(), func() bool { return len(v.Snapshot().ByEgress["e"]) == 2 })
}

func TestANarrowViewHasTheOwnersThatWereAskedForAndSaysSo(t *testing.T) {
	c := dial(t, start(t))
	l := grant(t, c, time.Minute)
	const last = 40
	claim := func(n int) {
		o := egress.Owner{IP: addr(fmt.Sprintf("10.0.0.%d", n)), Node: "n1", Since: noon, Why: egress.ReasonClaim}
		if ok, err := c.Claim(t.Context(), l, o, Former{}); !ok || err != nil {
			t.Error(ok, err)
		}
	}
	claim(1)
	claim(10) // its key begins with that of the other
	v := viewed(t, c)
	if s := v.Snapshot(); s.Partial || len(s.Owners) != 2 {
		t.Fatalf("at first: partial %t, %v", s.Partial, s.Owners)
	}
	narrow := Scope{Narrow: true, Owners: []netip.Addr{ip1, ip2, ip1}}
	v.Watch(narrow)
	until(t, "the narrow view", v.Changed(), func() bool { return v.Snapshot().Partial })
	if s := v.Snapshot(); len(s.Owners) != 1 || s.Owners[ip1].Node != "n1" {
		t.Errorf("narrow: %v", s.Owners)
	}
	// The owner of one egress IP after the other comes, and the view is changed all the time.
	claimed := make(chan struct{})
	go func() {
		defer close(claimed)
		for n := 2; n <= last; n++ {
			if n != 10 {
				claim(n)
			}
		}
	}()
	steps, whole := 0, 0
	all := func() bool {
		s := v.Snapshot()
		missing := false
		for n := 1; n <= last; n++ {
			_, owned := s.Owners[addr(fmt.Sprintf("10.0.0.%d", n))]
			switch {
			case s.Partial && owned && n > 2:
				t.Fatalf("step %d: the owner of 10.0.0.%d is seen", steps, n)
			case !s.Partial && owned && missing && n != 10:
				t.Fatalf("step %d: all are said to be there, and one before 10.0.0.%d is not: %v", steps, n, s.Owners)
			}
			missing = missing || !owned
		}
		steps++
		if !s.Partial {
			whole++
		}
		return !s.Partial && len(s.Owners) == last
	}
	for done := false; !done; {
		select {
		case <-claimed:
			done = true
		case <-v.Changed():
		}
		all()
		if steps%2 == 0 {
			v.Watch(narrow)
		} else {
			v.Watch(Scope{})
		}
	}
	v.Watch(Scope{}) // and no more of that: a view that is changed faster than it comes never comes
	until(t, "all owners", v.Changed(), all)
	t.Logf("%d steps, %d with all owners", steps, whole)
}
