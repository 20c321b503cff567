package nft

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// The node of a pod translates what the pod sends to the egress IP, and to a port of a block that is this node's alone,
// whichever node is the gateway. So a gateway has no state of connections. A packet out of the overlay with one of its
// egress IPs as the source leaves if the port is of a block of the node that sent it; a packet to an egress IP goes to
// the node that has the block of the port. Both are notrack, so no NAT of another program sees them.

// unitMask takes a port to the first of its unit. A block is a whole number of units, so that one lookup in a hash
// finds the block of a port.
const unitMask = ^uint16(egress.MinBlock - 1)

// portAt is where a kind of packets has the port of the block, or what takes its place, as the identifier of an ICMP
// echo.
type portAt struct {
	words  string
	match  []expr.Any
	sets   []anonymousSet
	offset uint32 // in the transport header, bytes
}

// way is the direction of a packet: from a pod, or to one.
type way int

const (
	leaving way = iota
	returning
)

// portsAt returns where packets of the family have the port, for one direction.
func (f family) portsAt(w way) []portAt {
	request, reply, errors, header, protocolAt := byte(8), byte(0), setOf(icmpType, []byte{3}, []byte{11}, []byte{12}), uint32(20), uint32(9)
	name, errorNames := "icmp", "destination-unreachable, time-exceeded, parameter-problem"
	// an IP header without options (RFC 791, section 3.1)
	first := []expr.Any{load(expr.PayloadBaseTransportHeader, 8, 1), equals(0x45)}
	if f.number == unix.NFPROTO_IPV6 {
		request, reply, header, protocolAt, first = 128, 129, 40, 6, nil
		errors = setOf(icmpv6Type, []byte{1}, []byte{2}, []byte{3}, []byte{4})
		name, errorNames = "icmpv6", "destination-unreachable, packet-too-big, time-exceeded, parameter-problem"
	}
	transports := setOf(transport, []byte{unix.IPPROTO_TCP}, []byte{unix.IPPROTO_UDP}, []byte{unix.IPPROTO_SCTP})
	byteAt := func(offset uint32) expr.Any { return load(expr.PayloadBaseTransportHeader, offset, 1) }
	icmp := []expr.Any{loadMeta(expr.MetaKeyL4PROTO), equals(f.icmpNum)}
	quoting := slices.Concat(icmp, []expr.Any{byteAt(0), in(anonymous)}, first)
	// A packet has the block's port as its source on the way out, as its destination on the way back. What is quoted
	// went the other way.
	port, quotedPort, echo, echoName := uint32(0), uint32(2), request, "echo-request"
	if w == returning {
		port, quotedPort, echo, echoName = 2, 0, reply, "echo-reply"
	}
	// An ICMP error has 8 bytes before what it quotes; an echo has its identifier after 4 (RFC 792, RFC 4443).
	return []portAt{
		{"meta l4proto { tcp, udp, sctp }", []expr.Any{loadMeta(expr.MetaKeyL4PROTO), in(anonymous)}, []anonymousSet{transports}, port},
		{name + " type " + echoName, slices.Concat(icmp, []expr.Any{byteAt(0), equals(echo)}), nil, 4},
		{fmt.Sprintf("%s type { %s } @th,%d,8 { tcp, udp, sctp }", name, errorNames, 8*(8+protocolAt)),
			slices.Concat(quoting, []expr.Any{byteAt(8 + protocolAt), in(anonymous)}), []anonymousSet{errors, transports}, 8 + header + quotedPort},
		{fmt.Sprintf("%s type { %s } @th,%d,8 %s", name, errorNames, 8*(8+protocolAt), name),
			slices.Concat(quoting, []expr.Any{byteAt(8 + protocolAt), equals(f.icmpNum)}), []anonymousSet{errors}, 8 + header + 4},
	}
}

// unit matches the packets, and loads an address of theirs and the unit of the port, beginning n bytes after reg.
func (p portAt) unit(f family, n uint32, side string) term {
	address := f.source
	if side == "daddr" {
		address += f.address.Bytes
	}
	port := register(n + f.address.Bytes)
	return term{
		words: fmt.Sprintf("%s %s %s . @th,%d,16 & 0x%x", p.words, f.name, side, p.offset*8, unitMask),
		exprs: slices.Concat(f.is(), p.match, []expr.Any{
			&expr.Payload{DestRegister: register(n), Base: expr.PayloadBaseNetworkHeader, Offset: address, Len: f.address.Bytes},
			&expr.Payload{DestRegister: port, Base: expr.PayloadBaseTransportHeader, Offset: p.offset, Len: 2},
			&expr.Bitwise{SourceRegister: port, DestRegister: port, Len: 2, Mask: binary.BigEndian.AppendUint16(nil, unitMask), Xor: make([]byte, 2)},
		}),
		sets: p.sets,
	}
}

// ofSender matches a packet whose port is of a block of the node that has sent it.
func (p portAt) ofSender(f family) term {
	t := p.unit(f, 8, "saddr")
	t.words += " ether saddr @origin" + f.digit
	t.exprs = append(t.exprs, etherFrom.load(), in("origin"+f.digit))
	return t
}

// ofOther matches a packet whose port is of a block of another node, and loads that node's PeerMark.
func (p portAt) ofOther(f family) term {
	t := p.unit(f, 0, "daddr")
	t.words += " map @port" + f.digit
	t.exprs = append(t.exprs, mapped("port"+f.digit))
	return t
}

// markOfSource sets the packet mark to what a map has for the source; the rule ends there when it has nothing.
func (f family) markOfSource(set string) term {
	return words(fmt.Sprintf("meta mark set %s saddr map @%s%s", f.name, set, f.digit),
		append(f.is(), f.saddr(), mapped(set+f.digit), setMeta(expr.MetaKeyMARK))...)
}

// fromBlocks are the rules, before conntrack, for what comes out of the overlay.
func fromBlocks(chain string) []rule {
	return append([]rule{
		// A mark without IDBit would be one of this node's routing marks, which no other node may choose.
		newRule(chain, markIs(egress.IDBit, 0), markIsNot(0), count(CounterSender), drop()),
	}, perFamily(func(f family) rule {
		return newRule(chain, ofFamily(f), enter("block_from"+f.digit))
	})...)
}

// toBlocks are the rules, before conntrack, for what comes by other links.
func toBlocks(chain string) []rule {
	return perFamily(func(f family) rule {
		return newRule(chain, daddrIn(f, "hostedip"+f.digit), enter("block_back"+f.digit))
	})
}

// nodeOfDestination sets the packet mark to the PeerMark of the node whose egress.OverlaySource the destination is.
func nodeOfDestination(f family) term {
	end := load(expr.PayloadBaseNetworkHeader, f.source+2*f.address.Bytes-4, 4)
	return words(fmt.Sprintf("meta mark set @nh,%d,32 << 16", 8*(f.source+2*f.address.Bytes-4)), end,
		&expr.Byteorder{SourceRegister: reg, DestRegister: reg, Op: expr.ByteorderNtoh, Len: 4, Size: 4}, shiftLeft{bits: 16}, setMeta(expr.MetaKeyMARK))
}

// blockChains decide what passes a gateway without conntrack: block_from sees what comes out of the overlay with an
// egress IP, block_back what comes to one by another link. What block_back does not match may be of a connection of
// this node.
func blockChains() []chain {
	var chains []chain
	for _, f := range families {
		name := func(n string) string { return "block_" + n + f.digit }
		var check, returned []rule
		for _, p := range f.portsAt(leaving) {
			check = append(check, newRule(name("from"), p.ofSender(f), enter(name("pass"))))
		}
		for _, p := range f.portsAt(returning) {
			returned = append(returned, newRule(name("back"), p.ofOther(f), setMark(egress.ToNodeMark), notrack(), accept()))
		}
		chains = append(chains,
			chain{name("from"), hook{}, slices.Concat(check, []rule{
				// hostedip counts what comes for the IP, and nothing else
				newRule(name("from"), f.markOfSource("id"), count(CounterSender), drop()),
				newRule(name("from"), saddrIn(f, "pooled"+f.digit), count(CounterUnhosted), drop()),
			})},
			chain{name("pass"), hook{}, []rule{
				newRule(name("pass"), f.markOfSource("id"), overLimit(markOfPacket, "bandwidth"), count(CounterBandwidth), drop()),
				newRule(name("pass"), alive(), saddrIn(f, "permit"+f.digit), f.markOfSource("exit"), notrack(), accept()),
				newRule(name("pass"), f.markOfSource("id"), addToGuarded(markOfPacket)),
				newRule(name("pass"), count(CounterGuard), drop()),
			}},
			chain{name("back"), hook{}, returned})
	}
	return chains
}

// toNodeChain sets the mark of a packet that enters the overlay: the index of the node that it is for and, for a packet
// of a pod of this node, the id. At a gateway that has lost its tables, a packet with an id is routed nowhere.
func toNodeChain() chain {
	rules := append([]rule{newRule("to_node", direction("original", 0),
		words("meta mark set ct mark map @gateway", loadCt(expr.CtKeyMARK), mapped("gateway"), setMeta(expr.MetaKeyMARK)), accept())},
		perFamily(func(f family) rule {
			return newRule("to_node", direction("reply", 1), toOverlaySource(f), nodeOfDestination(f), accept())
		})...)
	for _, f := range families {
		for _, p := range f.portsAt(returning) {
			t := p.ofOther(f)
			t.words = "meta mark set " + t.words
			t.exprs = append(t.exprs, setMeta(expr.MetaKeyMARK))
			rules = append(rules, newRule("to_node", t, accept()))
		}
	}
	// it is for no node, whatever mark others have given to it
	return chain{"to_node", hook{}, append(rules, newRule("to_node", setMark(0)))}
}

// snatToRange translates to the ports that a map has for the connection's id. The rule ends where there are none, or
// for a protocol without ports.
func snatToRange(f family, set string, ports portChoice) term {
	nat := f.snat()
	nat.RegProtoMin, nat.RegAddrMax, nat.RegProtoMax = register(f.address.Bytes), register(f.address.Bytes+4), register(2*f.address.Bytes+4)
	nat.Specified = true
	line := fmt.Sprintf("meta nfproto %s meta l4proto { %s, tcp, udp, sctp } snat %s to ct mark map @%s%s", f.protocol, f.icmp, f.name, set, f.digit)
	if ports == randomPort {
		line, nat.FullyRandom = line+" fully-random", true
	}
	return term{
		words: line,
		exprs: append(f.is(), loadMeta(expr.MetaKeyL4PROTO), in(anonymous), loadCt(expr.CtKeyMARK), mapped(set+f.digit), nat),
		sets:  []anonymousSet{setOf(transport, []byte{f.icmpNum}, []byte{unix.IPPROTO_TCP}, []byte{unix.IPPROTO_UDP}, []byte{unix.IPPROTO_SCTP})},
	}
}

// addressNodeChain gives a frame the MAC address of the node that its mark says. It needs the overlay link.
func addressNodeChain() chain {
	return chain{"to_node", hook{nftables.ChainTypeFilter, "egress", *nftables.ChainHookEgress, 0, egress.OverlayLink}, []rule{
		newRule("to_node", words(fmt.Sprintf("@ll,0,48 set meta mark & 0x%08x map @node", uint32(egress.PeerMask)),
			loadMeta(expr.MetaKeyMARK), mask(egress.PeerMask, 0), mapped("node"), etherTo.store())),
		newRule("to_node", words(fmt.Sprintf("meta mark set meta mark & 0x%08x", uint32(^egress.PeerMask)),
			loadMeta(expr.MetaKeyMARK), mask(^egress.PeerMask, 0), setMeta(expr.MetaKeyMARK))),
		newRule("to_node", markIsNot(0), words(fmt.Sprintf("meta mark set meta mark | 0x%08x", uint32(egress.IDBit)),
			loadMeta(expr.MetaKeyMARK), mask(^egress.IDBit, egress.IDBit), setMeta(expr.MetaKeyMARK))),
	}}
}
