package nft

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// addressGuardChains are the address guard: they keep what is no egress connection off the egress IPs: as a
// destination, before every DNAT, since a NodePort or a hostPort is one at each address of the node, and, for processes
// of the node, as a source. Of the type nat, they see the first packet of a connection only. (What is in none meets no
// DNAT, and as a source address_guard_lost.)
func addressGuardChains() []chain {
	base := func(name string, num *nftables.ChainHook) hook {
		return hook{nftables.ChainTypeNAT, name, *num, -199 /* the kernel takes no less */, ""}
	}
	services := func(chain string) []rule {
		return perFamily(func(f family) rule {
			return newRule(chain, daddrIn(f, "egressip"+f.digit), noICMP(f), count(CounterService), drop())
		})
	}
	return []chain{
		{"address_guard", base("prerouting", nftables.ChainHookPrerouting), services("address_guard")},
		// No right is needed to bind to an address of the node, or for IPv6 to any. A static egress IP is the node's
		// own, and not in a pool.
		{"address_guard_out", base("output", nftables.ChainHookOutput), append(services("address_guard_out"), perFamily(func(f family) rule {
			return newRule("address_guard_out", ofProcess(), saddrIn(f, "pooled"+f.digit), noICMP(f), count(CounterForged), drop())
		})...)},
	}
}

// addressGuardLostChain drops what a process sends with an egress IP and address_guard_out does not see: what is in no
// connection that conntrack can place, or excepted from it.
func addressGuardLostChain() chain {
	return chain{"address_guard_lost", hook{}, perFamily(func(f family) rule {
		return newRule("address_guard_lost", saddrIn(f, "pooled"+f.digit), noICMP(f), count(CounterForged), drop())
	})}
}

// noICMP matches what is no ICMP of the family.
func noICMP(f family) term {
	return words("meta l4proto != "+f.icmp, loadMeta(expr.MetaKeyL4PROTO), differs(f.icmpNum))
}

// forged are the rules that drop what comes in with an egress IP as its source, unless it comes by the link by which
// this node would route to that IP.
func forged(chain string) []rule {
	return perFamily(func(f family) rule {
		return newRule(chain, saddrIn(f, "source"+f.digit), reversePath("missing"), count(CounterForged), drop())
	})
}

// narrowChain is for ICMP errors that say that a packet to a node does not fit a link on its way: the kernel believes
// whoever says so, for 10 minutes, and sends what is larger in fragments from then on, by IPv6 not at all. A router
// says it, or a node, by the link that leads there, and no pod of this node; those of others are not heard by theirs.
func narrowChain() chain {
	pods := func(set string) []rule {
		return perFamily(func(f family) rule { return newRule("narrow", saddrIn(f, set+f.digit), count(CounterForged), drop()) })
	}
	return chain{"narrow", hook{}, slices.Concat(
		[]rule{newRule("narrow", reversePath("missing"), count(CounterForged), drop())},
		perFamily(func(f family) rule { return newRule("narrow", saddrIn(f, "node"+f.digit), back()) }),
		pods("podcidr"), pods("selected"), pods("known"),
		// By every link there is a way to these.
		[]rule{newRule("narrow", words("ip6 saddr fe80::/10", append(ipv6.is(), ipv6.saddr(),
			&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 16, Mask: append([]byte{0xff, 0xc0}, make([]byte, 14)...), Xor: make([]byte, 16)},
			equals(append([]byte{0xfe, 0x80}, make([]byte, 14)...)...))...), count(CounterForged), drop())})}
}

// tooBigForNode matches such errors, by the destination of the packet that they quote (RFC 792, RFC 4443 section 3.2).
func tooBigForNode(f family) term {
	line, kind := "icmp type destination-unreachable icmp code frag-needed", []byte{3, 4}
	if f.number == unix.NFPROTO_IPV6 {
		line, kind = "icmpv6 type packet-too-big", []byte{2}
	}
	offset := 8 + f.source + f.address.Bytes
	return words(fmt.Sprintf("%s @th,%d,%d @node%s", line, 8*offset, 8*f.address.Bytes, f.digit),
		append(f.is(), loadMeta(expr.MetaKeyL4PROTO), equals(f.icmpNum), load(expr.PayloadBaseTransportHeader, 0, uint32(len(kind))), equals(kind...),
			load(expr.PayloadBaseTransportHeader, offset, f.address.Bytes), in("node"+f.digit))...)
}
