package cloud

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/egret-project/egret/egress"
)

// state is what a decision goes by: what etcd holds, and what the cloud said last.
type state struct {
	owners    map[netip.Addr]egress.Owner // without those of static IPs
	nodes     map[string]egress.Node
	own       map[netip.Addr]own  // addresses of nodes
	gateways  map[string]bool     // the nodes that a pool selects
	allocated map[netip.Addr]bool // also where allocation or owner cannot be read
	records   map[netip.Addr]egress.CloudAddress
	revisions map[netip.Addr]int64 // of the records

	// holders are the interfaces that have the addresses that were read. An address that was read and is not among
	// them has nobody.
	holders map[netip.Addr]string
}

// own is whose an address of a node is.
type own struct {
	node string
	// first is that of the first address of its family. The others may be egress IPs: Kubernetes' controllers for AWS
	// write all addresses of an interface into the Node.
	first bool
}

func (s state) addNode(n egress.Node) {
	s.nodes[n.Name] = n
	for _, ip := range n.Addresses {
		if first, _ := n.Primary(ip); !s.own[ip].first {
			s.own[ip] = own{node: n.Name, first: first == ip}
		}
	}
}

// verb is what is done about an address.
type verb string

const (
	assign   verb = "assign"   // to an interface: nobody has it, or Egret may move it
	unassign verb = "unassign" // from the interface that has it
	confirm  verb = "confirm"  // write down that it is where Egret wants it: etcd alone
	forget   verb = "forget"   // delete the record: etcd alone
)

// step is the next thing to do about an address.
type step struct {
	verb  verb
	ip    netip.Addr
	iface string
	move  bool // of an assign: whoever has it loses it
}

// group is what steps of one call have in common.
type group struct {
	verb  verb
	iface string
	move  bool
	is4   bool // one call is about one family
}

func (s step) group() group { return group{s.verb, s.iface, s.move, s.ip.Is4()} }

var errNoInterface = errors.New("the cloud shows no network interface with an address of the node")

// next returns the next step about an address that was read. ok is false when there is none, with the reason in err
// where something is wrong.
func (s state) next(ip netip.Addr) (out step, ok bool, err error) {
	record, recorded := s.records[ip]
	holder := s.holders[ip]
	ours := recorded && record.Egrets(holder)
	owner, owned := s.owners[ip]
	of, own := s.own[ip]
	own = own && (of.first || !recorded)
	switch {
	case owned && !s.allocated[ip]: // any agent can write an owner; an allocation crdsync alone
		return step{}, false, nil
	case owned && own:
		return step{}, false, fmt.Errorf("the egress IP is an address of node %s: take it out of its pool", of.node)
	case !owned:
		switch {
		case !recorded || s.allocated[ip]:
			return step{}, false, nil
		case holder != "" && ours && !own:
			return step{verb: unassign, ip: ip, iface: holder}, true, nil
		}
		return step{verb: forget, ip: ip}, true, nil
	}
	want := s.iface(owner.Node, ip)
	switch {
	case want == "":
		return step{}, false, fmt.Errorf("node %s: %w", owner.Node, errNoInterface)
	case holder == want && recorded && len(record.Asked) == 0:
		return step{}, false, nil
	case holder == want:
		return step{verb: confirm, ip: ip, iface: want}, true, nil
	case holder != "" && !ours:
		return step{}, false, fmt.Errorf("%s has the address, and Egret has not assigned it there: unassign it by hand, or "+
			"take it out of its pool", holder)
	case holder != "" && !ip.Is4():
		return step{verb: unassign, ip: ip, iface: holder}, true, nil
	}
	return step{verb: assign, ip: ip, iface: want, move: ours && ip.Is4()}, true, nil
}

// iface returns the network interface of a node: the one that has its first address of the family, or else any of its
// addresses: that is the link that agents put egress IPs on. Empty: the cloud shows none. Addresses that Egret assigned
// do not tell: Kubernetes' controllers for AWS may write them into the Node, and wherever one is would be right.
func (s state) iface(node string, like netip.Addr) string {
	n := s.nodes[node]
	if primary, ok := n.Primary(like); ok && s.holders[primary] != "" {
		return s.holders[primary]
	}
	for _, ip := range n.Addresses {
		if _, ours := s.records[ip]; ours {
			continue
		}
		if h := s.holders[ip]; h != "" {
			return h
		}
	}
	return ""
}

// addresses returns the addresses that there is something to decide about, sorted.
func (s state) addresses() []netip.Addr {
	seen := map[netip.Addr]bool{}
	for ip := range s.owners {
		if s.allocated[ip] {
			seen[ip] = true
		}
	}
	for ip := range s.records {
		seen[ip] = true
	}
	return sorted(seen)
}

// toRead returns the addresses that there is something to decide about, and those of the nodes that own them or may
// come to: with these read, a move takes one call.
func (s state) toRead() map[netip.Addr]bool {
	out := map[netip.Addr]bool{}
	for _, ip := range s.addresses() {
		out[ip] = true
	}
	add := func(n egress.Node) {
		for _, ip := range n.Addresses {
			out[ip] = true
		}
	}
	for ip, o := range s.owners {
		if s.allocated[ip] {
			add(s.nodes[o.Node])
		}
	}
	for name, yes := range s.gateways {
		if yes {
			add(s.nodes[name])
		}
	}
	return out
}

func sorted[V any](m map[netip.Addr]V) []netip.Addr {
	out := make([]netip.Addr, 0, len(m))
	for ip := range m {
		out = append(out, ip)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// calls puts steps into calls, at most so many addresses in each, in a fixed order. Steps of one group are of one
// call where they fit.
func calls(steps []step, most int) (out [][]step) {
	slices.SortStableFunc(steps, func(a, b step) int {
		return cmp.Or(cmp.Compare(a.verb, b.verb), cmp.Compare(a.iface, b.iface), compareBool(a.move, b.move),
			a.ip.Compare(b.ip))
	})
	for _, s := range steps {
		if n := len(out); n > 0 && out[n-1][0].group() == s.group() && len(out[n-1]) < most {
			out[n-1] = append(out[n-1], s)
			continue
		}
		out = append(out, []step{s})
	}
	return out
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}
