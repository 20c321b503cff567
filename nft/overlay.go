package nft

import (
	"fmt"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// overlayChains see the overlay's own packets, VXLAN, before and instead of conntrack; and what comes out of it.
// Whoever can send a datagram to the overlay's port of a gateway, and seem to be a node, sends with its egress IPs.
func overlayChains() []chain {
	base := func(name string, num *nftables.ChainHook, prio nftables.ChainPriority) hook {
		return hook{nftables.ChainTypeFilter, name, *num, prio, ""}
	}
	toNode := func(chain, to string) []rule {
		return perFamily(func(f family) rule { return newRule(chain, daddrIn(f, "node"+f.digit), enter(to)) })
	}
	foreign := func(chain string, terms ...term) rule {
		return newRule(chain, append(terms, count(CounterForeign), drop())...)
	}
	return []chain{
		// Before anybody else sees the mark that a packet comes with (-300: iptables' raw).
		{"overlay_in", base("prerouting", nftables.ChainHookPrerouting, -310), append([]rule{
			newRule("overlay_in", fromOverlay(), enter("from_overlay")),
			newRule("overlay_in", byVLAN(), jump("subnet")),
			newRule("overlay_in", toOverlay(), enter("overlay")),
		}, toBlocks("overlay_in")...)},
		{"from_overlay", hook{}, fromBlocks("from_overlay")},
		// What is only forwarded, and to no node, is none of ours: pods may use the port among themselves. It may be
		// one of a block, too.
		{"overlay", hook{}, slices.Concat(toNode("overlay", "overlay_from"), toBlocks("overlay"), []rule{foreign("overlay", localDestination())})},
		subnetChain(),
		// A node sends to a node: this one, or another where this one routes between them. The way to it is looked up
		// once in a while only: it costs as much as all else here.
		{"overlay_from", hook{}, slices.Concat(
			perFamily(func(f family) rule { return newRule("overlay_from", heard(f), notrack(), accept()) }),
			perFamily(func(f family) rule { return newRule("overlay_from", fromPeer(f), reversePath("exists"), hear(f)) }),
			perFamily(func(f family) rule {
				return newRule("overlay_from", fromPeer(f), reversePath("exists"), notrack(), accept())
			}),
			[]rule{foreign("overlay_from")})},
		// Whatever else comes here: by a broadcast, or by a Service, after its DNAT and after IPVS (98).
		{"overlay_local", base("input", nftables.ChainHookInput, 300), []rule{newRule("overlay_local", toOverlay(), enter("overlay_heard"))}},
		// A frame without an id would come out of the overlay with the mark that others have given to its packet.
		{"overlay_heard", hook{}, []rule{foreign("overlay_heard", tracked()), newRule("overlay_heard", setMark(0))}},
		{"overlay_out", base("output", nftables.ChainHookOutput, -300), []rule{
			newRule("overlay_out", toOverlay(), enter("overlay_sent")),
		}},
		{"overlay_sent", hook{}, toNode("overlay_sent", "overlay_own")},
		// The kernel's own packets have no socket of a process, and no connection yet, as those have that IPVS sends
		// on.
		{"overlay_own", hook{}, []rule{
			foreign("overlay_own", ofProcess()),
			foreign("overlay_own", seen()),
			// The id has done its work: in the mark it would mean something to others.
			newRule("overlay_own", notrack(), setMark(0)),
		}},
		{"overlay_leaving", hook{}, toNode("overlay_leaving", "overlay_left")},
		{"overlay_left", hook{}, []rule{foreign("overlay_left", tracked()), newRule("overlay_left", accept())}},
		{"senders", hook{}, perFamily(func(f family) rule {
			return newRule("senders", unknownSender(f), count(CounterSender), drop())
		})},
	}
}

// betweenNodes are rules that accept what has come from a node, which overlay_from has seen to.
func betweenNodes(chain string) []rule {
	return perFamily(func(f family) rule { return newRule(chain, toOverlay(), daddrIn(f, "node"+f.digit), accept()) })
}

// leavesForOverlay is the first rule of a chain in postrouting: after DNAT, and before SNAT, which would make the
// source a node's.
func leavesForOverlay(chain string) rule { return newRule(chain, toOverlay(), jump("overlay_leaving")) }

// fromOverlay matches what comes out of the overlay, intoOverlay what leaves by it.
func fromOverlay() term { return byOverlay("iifname", expr.MetaKeyIIFNAME) }
func intoOverlay() term { return byOverlay("oifname", expr.MetaKeyOIFNAME) }

func byOverlay(name string, k expr.MetaKey) term {
	return words(fmt.Sprintf("%s %q", name, egress.OverlayLink), loadMeta(k), equals([]byte(linkKey(egress.OverlayLink))...))
}

// fromOverlaySource matches what has an egress.OverlaySource as its source, toOverlaySource what has one as its
// destination.
func fromOverlaySource(f family) term { return overlaySource(f, "saddr", f.source) }
func toOverlaySource(f family) term   { return overlaySource(f, "daddr", f.source+f.address.Bytes) }

func overlaySource(f family, side string, offset uint32) term {
	prefix := egress.OverlaySources4
	if f.number == unix.NFPROTO_IPV6 {
		prefix = egress.OverlaySources6
	}
	fixed := prefix.Addr().AsSlice()[:prefix.Bits()/8]
	return words(fmt.Sprintf("%s %s %s", f.name, side, prefix),
		append(f.is(), load(expr.PayloadBaseNetworkHeader, offset, uint32(len(fixed))), equals(fixed...))...)
}

func toOverlay() term { return udpTo(egress.OverlayPort) }

// tracked matches what no notrack rule has excepted from conntrack.
func tracked() term {
	return words("ct state != untracked", loadCt(expr.CtKeySTATE), differs(native(expr.CtStateBitUNTRACKED)...))
}

func untracked() term {
	return ctState("untracked", expr.CtStateBitUNTRACKED)
}

// ofProcess matches what comes from a socket of a process: there is no such user as the number, and a packet of anybody
// else has none.
func ofProcess() term {
	return words("meta skuid != 4294967295", loadMeta(expr.MetaKeySKUID), differs(native(0xffffffff)...))
}

// seen matches, before conntrack sees a packet, what is in a connection already, or is untracked.
func seen() term {
	return words("ct state != invalid", loadCt(expr.CtKeySTATE), differs(native(expr.CtStateBitINVALID)...))
}

// reversePath matches whether the link that a packet comes in by leads to its source, whatever rp_filter says: "exists"
// or "missing".
func reversePath(result string) term {
	return words("fib saddr . iif oif "+result,
		&expr.Fib{Register: reg, ResultOIF: true, FlagSADDR: true, FlagIIF: true, FlagPRESENT: true},
		equals(map[string]byte{"exists": 1, "missing": 0}[result], 0, 0, 0))
}

// fromPeer matches VXLAN of another node by its source, and by the source of the Ethernet frame in it: after the
// headers of UDP and VXLAN, and the frame's destination. So the latter tells later which node a packet is of.
func fromPeer(f family) term {
	return words(fmt.Sprintf("%s saddr . @th,176,48 @peer%s", f.name, f.digit), append(f.is(), f.saddr(), frameSource(f), in("peer"+f.digit))...)
}

func frameSource(f family) expr.Any {
	return &expr.Payload{DestRegister: register(f.address.Bytes), Base: expr.PayloadBaseTransportHeader, Offset: 8 + 8 + 6, Len: 6}
}

// heardFor is for how long a node may send by a link after that was found to be the way to it.
const heardFor = time.Second

// hear remembers by which link a node sends, heard matches what is sent so. Where the set takes no more, the rule ends.
func hear(f family) term {
	return words(fmt.Sprintf("add @heard%s { %s saddr . @th,176,48 . iif timeout %dms }", f.digit, f.name, heardFor.Milliseconds()),
		append(heardKey(f), &expr.Dynset{SrcRegKey: reg, SetName: "heard" + f.digit, Operation: unix.NFT_DYNSET_OP_ADD, Timeout: heardFor})...)
}

func heard(f family) term {
	return words(fmt.Sprintf("%s saddr . @th,176,48 . iif @heard%s", f.name, f.digit), slices.Concat(f.is(), heardKey(f), []expr.Any{in("heard" + f.digit)})...)
}

func heardKey(f family) []expr.Any {
	return []expr.Any{f.saddr(), frameSource(f), &expr.Meta{Key: expr.MetaKeyIIF, Register: register(f.address.Bytes + 8)}}
}

// unknownSender matches what does not have the source that, for the egress IP that the connection is of, it has from
// the node that sent it.
func unknownSender(f family) term {
	set := "sender" + f.digit
	source := &expr.Payload{DestRegister: register(8), Base: expr.PayloadBaseNetworkHeader, Offset: f.source, Len: f.address.Bytes}
	return words(fmt.Sprintf("ether saddr . %s saddr . ct mark != @%s", f.name, set), append(f.is(),
		loadMeta(expr.MetaKeyIIFTYPE), equals(binaryutil.NativeEndian.PutUint16(unix.ARPHRD_ETHER)...),
		etherFrom.load(), source, &expr.Ct{Key: expr.CtKeyMARK, Register: register(8 + f.address.Bytes)}, notIn(set))...)
}

// register returns the one that begins n bytes, a multiple of 4, after reg.
func register(n uint32) uint32 { return unix.NFT_REG32_00 + n/4 }
