package nft

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
)

// addrAt returns the address that is i behind another one.
func addrAt(base string, i int) netip.Addr {
	b := netip.MustParseAddr(base).As4()
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, binary.BigEndian.Uint32(b[:])+uint32(i))))
}

// Kubernetes is made for 150,000 pods. Each of them may be the only one of its egress on its node, and one gateway have
// the IPs of all.
func TestOneGatewayTakesTheSendersOfALargeCluster(t *testing.T) {
	const ips, nodes = 200, 750
	s := State{Hosted: map[egress.ID]Hosted{}, OverlayMTU: 1450}
	for i := range ips {
		id, ip := egress.ID(i+1), addrAt("10.10.0.0", i+1)
		s.Hosted[id] = Hosted{IP: ip, Mark: egress.LocalMark}
		for n := range nodes {
			s.Senders = append(s.Senders, Sender{Node: addrAt("10.0.0.0", n+2), Source: egress.OverlaySource(n+2, id, ip), ID: id})
		}
	}
	reach(t, open(t), s)
}

// thousands returns the state of a gateway with 200 egress IPs, one of 50 among 5,000 nodes with 10,000.
func thousands() State {
	s := State{Pods: map[netip.Addr]egress.ID{}, NextHops: map[egress.ID]egress.Mark{}, Hosted: map[egress.ID]Hosted{}, Peers: map[int]netip.Addr{},
		Gateways: map[egress.ID]int{}, OverlaySources: map[egress.ID]netip.Addr{}, Blocks: map[egress.ID]egress.Block{}, OverlayMTU: 1450, Self: addrAt("10.0.0.0", 1)}
	for i := range 5000 {
		node := addrAt("10.0.0.0", i+1)
		s.Except = append(s.Except, netip.PrefixFrom(addrAt("100.64.0.0", i<<8), 24), netip.PrefixFrom(node, 32))
		if i > 0 {
			s.Nodes, s.Peers[i+1] = append(s.Nodes, node), node
		}
	}
	for i := range 10000 {
		ip := addrAt("10.10.0.0", i+1)
		s.Sources, s.Pooled = append(s.Sources, ip), append(s.Pooled, ip)
		if i >= 200 {
			continue
		}
		id := egress.ID(i + 1)
		s.Hosted[id], s.AddressGuard = Hosted{IP: ip, Mark: egress.LocalMark, Shared: true}, append(s.AddressGuard, ip)
		for n := range 10 {
			node := i*10 + n + 2
			s.Ports = append(s.Ports, Port{Block: egress.Block{IP: ip, First: uint16(2048 + n*256), Size: 256}, Index: node, Node: addrAt("10.0.0.0", node)})
			s.Senders = append(s.Senders, Sender{Node: addrAt("10.0.0.0", node), Source: egress.OverlaySource(node, id, ip), ID: id})
		}
	}
	for i := range 20 {
		id := egress.ID(300 + i)
		s.Pods[addrAt("100.64.0.0", i+2)], s.NextHops[id], s.Gateways[id] = id, egress.ToGatewayMark, i+2
	}
	return s
}

// holding returns what is observed of a kernel that has a state.
func holding(s State) Observed {
	var o Observed
	all := s.elements(new(memo))
	for _, t := range tables(s) {
		have := observedTable{exists: true, flags: t.flags, chains: map[string]observedChain{}, sets: map[string]observedSet{}, objects: map[string]objectKind{},
			elements: map[string]elements{}, limits: map[string]string{}}
		for _, c := range t.chains {
			var tags []string
			for _, r := range c.rules {
				tags = append(tags, r.tag)
			}
			have.chains[c.name] = observedChain{c.hook.observed(), tags}
		}
		for _, s := range t.sets {
			have.sets[s.name] = observedSet{s.flags, s.key.GetNFTMagic(), s.key.Bytes, s.value.GetNFTMagic(), s.value.Bytes, uint32(s.object), s.size, s.counted}
			if s.fromState() {
				have.elements[s.name] = all[s.name]
			}
		}
		for _, name := range t.counters {
			have.objects[name] = objectCounter
		}
		o.tables = append(o.tables, have)
	}
	return o
}

// BenchmarkOneMorePodAmongThousands is the comparison that an event of one pod costs a gateway of thousands.
func BenchmarkOneMorePodAmongThousands(b *testing.B) {
	want := thousands()
	have := holding(want)
	if c := Diff(have, want); !c.Empty() {
		b.Fatalf("what is held differs from what is wanted:\n%.1000s", c)
	}
	pod := netip.MustParseAddr("100.64.0.200")
	for name, diff := range map[string]func(Observed, State) Changes{"anew": Diff, "remembered": new(Differ).Diff} {
		b.Run(name, func(b *testing.B) {
			have := have
			delete(want.Pods, pod)
			if c := diff(have, want); name == "remembered" { // as after Apply
				for i := range have.tables {
					have.tables[i].elements = c.after[i]
				}
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if i%2 == 0 {
					want.Pods[pod] = 300
				} else {
					delete(want.Pods, pod)
				}
				if c := diff(have, want); c.Empty() != (i%2 == 1) {
					b.Fatal("the pod is not seen")
				}
			}
		})
	}
}

// What a Differ remembers is what it would make anew, whatever of a State has changed, in place or not.
func TestADifferThatRemembersDiffsAsOneThatDoesNot(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	addr := func() netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(20))}) }
	addrs := func(list []netip.Addr) []netip.Addr {
		switch r.IntN(6) {
		case 0:
			return append(list, addr())
		case 1:
			return nil
		case 2:
			if len(list) > 0 {
				list[r.IntN(len(list))] = addr()
			}
		}
		return list
	}
	var d Differ
	have, s := Observed{}, State{Self: addr(), Peers: map[int]netip.Addr{}}
	for step := range 500 {
		s.Sources, s.Pooled, s.Nodes = addrs(s.Sources), addrs(s.Pooled), addrs(s.Nodes)
		switch r.IntN(8) {
		case 0:
			s.Self = addr()
		case 1:
			s.Peers[r.IntN(5)+1] = addr()
		case 2:
			delete(s.Peers, r.IntN(5)+1)
		case 3:
			s.Except = append(s.Except, netip.PrefixFrom(addr(), 24+r.IntN(9)))
		case 4:
			s.Except = nil
		}
		want, got := Diff(have, s), d.Diff(have, s)
		if diff := cmp.Diff(want.String(), got.String()); diff != "" || !slices.Equal(want.Repairs, got.Repairs) {
			t.Fatalf("seed %d, step %d (-anew +remembered):\n%s", seed, step, diff)
		}
		if r.IntN(2) == 0 { // it is written: what is remembered is what the kernel has
			have = holding(s)
			for i := range have.tables {
				if got.after != nil {
					have.tables[i].elements = got.after[i]
				}
			}
		}
	}
}
