package plan

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
)

// A starting agent cuts off no pod of a record that it cannot read, and keeps no other.
func TestPodsStayWhereTheirOwnRecordsCouldNotBeRead(t *testing.T) {
	const members = "members/by-node/node-1/"
	pod := func(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 244, 1, n}) }
	// The kernel has pods of three egresses, one of ids that none has any more, and one that is said to be unselected.
	have := map[netip.Addr]egress.ID{pod(1): 1, pod(2): 2, pod(3): 3, pod(4): 4, pod(5): 2, pod(9): 1}
	for name, tt := range map[string]struct {
		faults []string
		want   map[netip.Addr]egress.ID
	}{
		"a pool, a node and an owner": {[]string{"pools/p", "nodes/node-2", "owners/10.0.0.1"}, map[netip.Addr]egress.ID{pod(1): 1, pod(2): 2, pod(3): 3}},
		"members":                     {[]string{members + "b"}, map[netip.Addr]egress.ID{pod(1): 1, pod(2): 2, pod(3): 3, pod(4): 4, pod(5): 2}},
		"members of another egress":   {[]string{members + "a"}, map[netip.Addr]egress.ID{pod(1): 1, pod(2): 2, pod(3): 3, pod(4): 4}},
		"an egress":                   {[]string{"egresses/b"}, map[netip.Addr]egress.ID{pod(1): 1, pod(2): 2, pod(3): 3}},
		"an egress and its members":   {[]string{"egresses/b", members + "b"}, map[netip.Addr]egress.ID{pod(1): 1, pod(2): 2, pod(3): 3, pod(4): 4, pod(5): 2}},
		"the pods of no egress":       {[]string{members + egress.Unselected}, map[netip.Addr]egress.ID{pod(1): 1, pod(2): 2, pod(3): 3}},
		"members of another node":     {[]string{"members/by-node/node-10/b"}, map[netip.Addr]egress.ID{pod(1): 1, pod(2): 2, pod(3): 3}},
	} {
		t.Run(name, func(t *testing.T) {
			s := cluster(3, 1)
			clear(s.Egresses)
			s.ByNode = map[string]egress.Members{egress.Unselected: {Pods: []egress.Member{{IPs: []netip.Addr{pod(9)}}}}}
			for i, name := range []string{"a", "b", "c"} {
				n := byte(i + 1)
				s.Egresses[name] = egress.Policy{Name: name, Addresses: []egress.Address{{IP: netip.AddrFrom4([4]byte{10, 10, 0, n}), ID: egress.ID(n)}}}
				s.ByNode[name] = egress.Members{Egress: name, Pods: []egress.Member{{IPs: []netip.Addr{pod(n)}}}}
			}
			for _, key := range tt.faults {
				s.Faults = append(s.Faults, egress.Fault{Key: key, Blind: true})
				if name, ok := strings.CutPrefix(key, members); ok {
					delete(s.ByNode, name)
				}
				if name, ok := strings.CutPrefix(key, "egresses/"); ok {
					delete(s.Egresses, name)
				}
			}
			d := Build(New(s), facts("node-1"), nil)
			if !d.NFT.Keep {
				t.Error("what the kernel has besides pods does not stay")
			}
			if diff := cmp.Diff(tt.want, d.Keeping(have).NFT.Pods, compare); diff != "" {
				t.Errorf("pods (-want +got):\n%s", diff)
			}
		})
	}
}

// It began after its egress could not be read, or its node did: nobody knows its egress IP, and with its node's address it is
// not to leave.
func TestANewPodOfAnEgressThatCouldNotBeReadSendsNothing(t *testing.T) {
	s := guide("")
	delete(s.Egresses, "egress-0001")
	s.Faults = []egress.Fault{{Key: "egresses/egress-0001", Blind: true}}
	d, pod := Build(New(s), facts("node-1"), nil), ip("10.244.1.2")
	if id, there := d.Keeping(nil).NFT.Pods[pod]; !there || id != 0 {
		t.Errorf("it is in the kernel: %t, with id %d; want that what it sends is dropped", there, id)
	}
	if id := d.Keeping(map[netip.Addr]egress.ID{pod: 7}).NFT.Pods[pod]; id != 7 {
		t.Errorf("with the id that the kernel has: %d, want 7", id)
	}
	d.Unknown = []string{"node-2"}
	if _, there := d.Keeping(nil).NFT.Pods[pod]; there {
		t.Error("while it is not known which addresses are pods', it is in the kernel")
	}
}

// The pods of an egress that went wait for no other one.
func TestAnEgressThatCouldNotBeReadIsNoneOfAShorterName(t *testing.T) {
	s := guide("")
	delete(s.Egresses, "egress-0001")
	s.Faults = []egress.Fault{{Key: "egresses/egress-00012", Blind: true}}
	d := Build(New(s), facts("node-1"), nil)
	if id, ok := d.NFT.Pods[ip("10.244.1.2")]; !ok || id != 0 || d.Unread != nil {
		t.Errorf("pods %v, unread %+v: want the pod without an address", d.NFT.Pods, d.Unread)
	}
}
