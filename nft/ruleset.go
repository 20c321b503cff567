package nft

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// The counters. Each counts packets that were dropped, and why.
const (
	// of a selected pod, or from the overlay, in no connection that conntrack can place
	CounterInvalid   = "invalid_dropped"
	CounterNoNextHop = "no_nexthop"        // of a selected pod whose egress IP lives nowhere now
	CounterUnhosted  = "overlay_unhosted"  // from the overlay, for an egress IP that is not this node's
	CounterGuard     = "guard_dropped"     // about to leave with a source that is no permitted egress IP
	CounterBandwidth = "bandwidth_dropped" // above the limit of its egress IP
	// the first of a source in the pod CIDRs of which it is not known yet whether it is selected
	CounterUnknown = "unknown_held"
	// of a selected pod, to the outside, in a connection that is not known to be an egress's
	CounterUnmarked = "unmarked_dropped"
	CounterService  = "service_dropped" // for a service of the node, at an egress IP
	CounterForeign  = "overlay_foreign" // for the overlay's port of a node, from anybody but a node
	// from the overlay, with a source that is no pod of the egress on the node that sent it
	CounterSender = "overlay_sender"
	CounterForged = "forged_dropped" // in the name of an egress IP, a pod, a router or a host outside, from somebody else
	CounterSubnet = "subnet_dropped" // from a host of a VLAN, for anything but an egress IP
	CounterARP    = "arp_dropped"    // ARP for an egress IP without permit
	CounterNDP    = "ndp_dropped"    // neighbor discovery for an egress IP without permit
)

// How many elements the sets may hold. The kernel keeps a set without such a bound in a table that it resizes in the
// background, and a dump that comes upon that misses elements with no sign of it. A bounded set is an array of lists,
// read in order: 8 bytes for each element that there might be, or 16, 23 MB in all.
const (
	maxIDs   = uint32(egress.MaxID) + 1
	maxNodes = egress.MaxNodeIndex + 1
	maxPods  = 16384 // of one family, and of their egress IPs; a hundred times what a kubelet runs by default
	// maxHosted is how many egress IPs one node may have, of one family.
	maxHosted = 8192
	// maxSenders is how many nodes may share the egress IPs of one gateway, each counted once for every IP, of one
	// family. Each of them has a pod that no other one counts: more than the 150,000 that Kubernetes is made for.
	maxSenders = 256 << 10
	// maxUnits is how many units of ports (egress.MinBlock) other nodes may have of the egress IPs of one gateway, of
	// one family: all ports of 256 IPs.
	maxUnits = 256 << 10
)

// tables returns the tables as they must be, elements apart: not to be changed. Only the MSS, the ports, the chains of
// the carriers and what renews permits depend on the State.
func tables(s State) []table {
	macs := map[string][6]byte{}
	for link, c := range s.Carriers {
		macs[link] = c.MAC
	}
	shape := fmt.Sprint(s.FirstPacketDelay, s.OverlayMTU, s.RandomPorts, s.Renewal, macs, len(s.Peers) > 0)
	built.Lock()
	defer built.Unlock()
	if all := built.tables[shape]; all != nil {
		return all
	}
	all := []table{inetTable(s), arpTable(), netdevTable(s.Carriers, len(s.Peers) > 0)}
	for i := range all {
		all[i] = all[i].renewed(s.Renewal)
	}
	if len(built.tables) >= 8 {
		clear(built.tables)
	}
	built.tables[shape] = all
	return all
}

// built are the tables that were asked for, by what they depend on. Making them takes longer than all else that Diff
// does, and a pass of the agent makes them several times over.
var built = struct {
	sync.Mutex
	tables map[string][]table
}{tables: map[string][]table{}}

func inetTable(s State) table {
	t := table{
		family: nftables.TableFamilyINet, name: egress.TableName,
		counters: []string{CounterBandwidth, CounterForeign, CounterForged, CounterGuard, CounterInvalid, CounterNDP, CounterNoNextHop,
			CounterSender, CounterService, CounterSubnet, CounterUnhosted, CounterUnknown, CounterUnmarked},
		chains: slices.Concat(overlayChains(), blockChains(), steeringChains(s.FirstPacketDelay), []chain{toNodeChain()}),
	}
	t.chains = append(t.chains, addressGuardChains()...)
	t.chains = append(t.chains, leavingChains(s)...)
	t.chains = append(t.chains, hostChains()...)
	for _, f := range families {
		t.sets = append(t.sets,
			set{name: "selected" + f.digit, key: f.address, size: maxPods, ofPods: true},
			set{name: "pod" + f.digit, key: f.address, value: mark, flags: flagMap, size: maxPods, ofPods: true},
			set{name: "snat" + f.digit, key: mark, value: f.address, flags: flagMap, size: maxHosted},
			set{name: "overlay" + f.digit, key: mark, value: f.address, flags: flagMap, size: maxPods},
			set{name: "known" + f.digit, key: f.address, size: maxPods},
			set{name: "podcidr" + f.digit, key: f.address, flags: flagInterval},
			set{name: "seen" + f.digit, key: f.via, flags: flagDynamic | flagTimeout, size: maxPods},
			set{name: "held" + f.digit, key: f.via, flags: flagDynamic | flagTimeout, size: maxPods},
			set{name: "except" + f.digit, key: f.address, flags: flagInterval},
			set{name: "egressip" + f.digit, key: f.address, size: maxHosted},
			set{name: "node" + f.digit, key: f.address, size: maxNodes},
			set{name: "peer" + f.digit, key: f.peer, size: maxNodes},
			set{name: "heard" + f.digit, key: f.via, flags: flagDynamic | flagTimeout, size: maxNodes},
			set{name: "came" + f.digit, key: f.came, flags: flagDynamic | flagTimeout, size: maxPods},
			set{name: "sender" + f.digit, key: f.sender, size: maxSenders, ofOtherNodes: true},
			set{name: "source" + f.digit, key: f.address, size: maxIDs},
			set{name: "pooled" + f.digit, key: f.address, size: maxIDs},
			set{name: "block" + f.digit, key: mark, value: f.block, flags: flagMap, size: maxPods},
			set{name: "shared" + f.digit, key: mark, value: f.block, flags: flagMap, size: maxHosted, ofOtherNodes: true},
			set{name: "port" + f.digit, key: f.unit, value: mark, flags: flagMap, size: maxUnits, ofOtherNodes: true},
			set{name: "origin" + f.digit, key: f.origin, size: maxUnits, ofOtherNodes: true},
			set{name: "hostedip" + f.digit, key: f.address, size: maxHosted, counted: true},
			set{name: "sentby" + f.digit, key: f.address, size: maxHosted, counted: true},
			set{name: "exit" + f.digit, key: f.address, value: mark, flags: flagMap, size: maxHosted, counted: true},
			set{name: "id" + f.digit, key: f.address, value: mark, flags: flagMap, size: maxHosted},
			set{name: "vlanip" + f.digit, key: f.linked, size: maxHosted},
			set{name: "permit" + f.digit, key: f.address, size: maxHosted, permits: true})
	}
	t.sets = append(t.sets,
		set{name: "answer6", key: address6, size: maxHosted, permits: true},
		set{name: "guarded", key: mark, flags: flagDynamic | flagTimeout, size: maxIDs},
		set{name: "opened", key: mark, flags: flagDynamic | flagTimeout, size: maxIDs},
		set{name: "bandwidth", key: mark, object: objectLimit, flags: flagObject, size: maxHosted},
		set{name: "nexthop", key: markPair, value: mark, flags: flagMap, size: maxPods},
		set{name: "gateway", key: mark, value: mark, flags: flagMap, size: maxPods},
		set{name: "hosted", key: markPair, value: mark, flags: flagMap, size: maxHosted})
	return t
}

// perFamily returns what make makes for every family, in order.
func perFamily(make func(f family) rule) []rule {
	var rules []rule
	for _, f := range families {
		rules = append(rules, make(f))
	}
	return rules
}

// steeringChains decide, after the Service DNAT (-100) and before the route lookup, whose a packet is and where it
// goes.
func steeringChains(delay time.Duration) []chain {
	pre := func(terms ...term) rule { return newRule("prerouting", terms...) }
	lost := ctState("invalid,untracked", expr.CtStateBitINVALID|expr.CtStateBitUNTRACKED)
	fresh := ctState("new", expr.CtStateBitNEW)
	return append([]chain{
		// Most of what comes here is of connections that are none of ours, and has to go on after as few expressions as
		// can be.
		{"prerouting", hook{nftables.ChainTypeFilter, "prerouting", *nftables.ChainHookPrerouting, -90, ""}, []rule{
			pre(fromOverlay(), enter("steer_from_overlay")),
			pre(tagged(), enter("steer_tagged")),
			pre(icmpOf(ipv4), jump("forged")),
			pre(icmpOf(ipv6), jump("forged")),
			pre(confirmed(), accept()),
			pre(fresh, jump("classify")),
			pre(lost, jump("invalid")),
			pre(tagged(), enter("steer")),
		}},
		{"steer_tagged", hook{}, []rule{
			newRule("steer_tagged", direction("reply", 1), setMark(egress.ToNodeMark), accept()),
			newRule("steer_tagged", enter("steer")),
		}},
		// An egress IP answers pings, so there are connections to it, and what is of those need not be from it. A host
		// of a VLAN that has an egress IP may say so: this node has no other way there than for egress IPs, and is not
		// to take one that somebody uses. (What it says to others is gone by then.)
		{"forged", hook{}, slices.Concat([]rule{newRule("forged", byVLAN(), neighbors(), back())}, forged("forged"),
			perFamily(func(f family) rule { return newRule("forged", tooBigForNode(f), jump("narrow")) }))},
		narrowChain(),
		{"classify", hook{}, slices.Concat(fromSubnet("classify"), forged("classify"), toItself("classify"), notEgress("classify"), perFamily(func(f family) rule {
			return newRule("classify", podMark(f, "ct mark", setCtMark()))
		}), unknown(delay))},
		{"delay", hook{}, delayRules(delay)},
		// A packet that conntrack cannot place, or is told not to, would leave without SNAT. The mark that is set is of
		// no use: it is how a rule matches the keys of a map.
		{"invalid", hook{}, slices.Concat(betweenNodes("invalid"), fromSubnet("invalid", ctState("invalid", expr.CtStateBitINVALID)), []rule{newRule("invalid", jump("forged"))}, notEgress("invalid"), perFamily(func(f family) rule {
			return newRule("invalid", podMark(f, "meta mark", setMeta(expr.MetaKeyMARK)), count(CounterInvalid), drop())
		}))},
		// What this node has to say of an answer to a pod, above all that it is too large for the pod's link, goes the
		// way of the pod's own packets, in its name: the gateway puts the egress IP into it, or else nobody outside
		// would know what it is about.
		{"output", hook{nftables.ChainTypeRoute, "output", *nftables.ChainHookOutput, -90, ""}, append(perFamily(func(f family) rule {
			return newRule("output", icmpOf(f), jump(f.icmpOut))
		}), newRule("output", lost, ofProcess(), jump("address_guard_lost")))},
		addressGuardLostChain(),
		{"neighbor", hook{}, neighborRules()},
		{"errors", hook{}, perFamily(func(f family) rule {
			return newRule("errors", ctState("related", expr.CtStateBitRELATED), direction("original", 0), tagged(), errorAboutPod(f), enter("steer_on"))
		})},
		// What arrived by the overlay never leaves by the overlay, and must be of an egress connection: an answer to a
		// connection that this node does not know, or not any more, has no id.
		{"steer_from_overlay", hook{}, append(perFamily(func(f family) rule {
			return newRule("steer_from_overlay", untracked(), saddrIn(f, "pooled"+f.digit), accept()) // by block_pass
		}),
			newRule("steer_from_overlay", direction("reply", 1), tagged(), setMark(0), accept()),
			newRule("steer_from_overlay", lost, count(CounterInvalid), drop()),
			newRule("steer_from_overlay", markIs(egress.Mark(egress.MaxID), 0), count(CounterInvalid), drop()),
			newRule("steer_from_overlay", fresh, connMarkFromID()),
			newRule("steer_from_overlay", jump("senders")),
			// The pod's node says whose the packet is; what conntrack has of its connection may be older.
			newRule("steer_from_overlay", markFromID()),
			newRule("steer_from_overlay", markFromBoth("hosted"), accept()),
			newRule("steer_from_overlay", count(CounterUnhosted), drop()),
		)},
	}, steerChains()...)
}

// seenFor is for how long a source that was delayed is not delayed again, counted from its last new connection. A
// source is an address, a MAC address and a link: so the next pod with the address is delayed, too, and nobody has the
// delay of others behind him by sending in their names.
const seenFor = 10 * time.Minute

// unknown are the last rules of classify: where a source goes that might be a selected pod and is not known yet.
func unknown(delay time.Duration) []rule {
	if delay == 0 {
		return nil
	}
	return append([]rule{newRule("classify", tagged(), back())}, perFamily(func(f family) rule {
		return newRule("classify", saddrIn(f, "podcidr"+f.digit), words(fmt.Sprintf("%s saddr != @known%s", f.name, f.digit), f.saddr(), notIn("known"+f.digit)), enter("delay"))
	})...)
}

// delayRules are the first-packet delay: they drop the packets of a source until delay after the first of them. Where
// the sets take no more, since somebody sends from many addresses, a source that is not in them yet is dropped until
// the agent knows it. Not so what comes by links without MAC addresses, by which no CNI is known to have pods.
func delayRules(delay time.Duration) []rule {
	if delay == 0 {
		return nil
	}
	// No pod of this node, or one in the name of another.
	rules := []rule{newRule("delay", reversePath("missing"), jump("strange"))}
	for _, f := range families {
		seen, held := "seen"+f.digit, "held"+f.digit
		source := func(verb, set string, d time.Duration, op uint32) term {
			return words(fmt.Sprintf("%s @%s { %s saddr . ether saddr . iif timeout %dms }", verb, set, f.name, d.Milliseconds()),
				append(f.sourceKey(), &expr.Dynset{SrcRegKey: reg, SetName: set, Operation: op, Timeout: d})...)
		}
		is := func(not, set string, lookup func(string) expr.Any) term {
			return words(fmt.Sprintf("%s saddr . ether saddr . iif %s@%s", f.name, not, set), append(f.sourceKey(), lookup(set))...)
		}
		rules = append(rules,
			newRule("delay", byEthernet(), ofFamily(f), is("", seen, in), is("!= ", held, notIn), source("update", seen, seenFor, unix.NFT_DYNSET_OP_UPDATE), back()),
			// In this order: where held takes no more, the source is not taken for one that was delayed.
			newRule("delay", byEthernet(), ofFamily(f), is("!= ", seen, notIn), source("add", held, delay, unix.NFT_DYNSET_OP_ADD),
				source("add", seen, seenFor, unix.NFT_DYNSET_OP_ADD)))
	}
	return append(rules, newRule("delay", byEthernet(), count(CounterUnknown), drop()))
}

// sourceKey loads who a packet is from, and by which link it comes.
func (f family) sourceKey() []expr.Any {
	return []expr.Any{
		f.saddr(),
		&expr.Payload{DestRegister: register(f.address.Bytes), Base: etherFrom.base, Offset: etherFrom.offset, Len: etherFrom.length},
		&expr.Meta{Key: expr.MetaKeyIIF, Register: register(f.address.Bytes + 8)},
	}
}

// byEthernet matches what comes in by a link with MAC addresses.
func byEthernet() term {
	return words("meta iiftype ether", loadMeta(expr.MetaKeyIIFTYPE), equals(binaryutil.NativeEndian.PutUint16(unix.ARPHRD_ETHER)...))
}

// notEgress are the first rules of a chain that returns for packets to which no egress applies, by their destination.
func notEgress(chain string) []rule {
	return append(
		perFamily(func(f family) rule { return newRule(chain, daddrIn(f, "except"+f.digit), back()) }),
		newRule(chain, localType(), back()))
}

// leavingChains see egress connections on their way out, in postrouting.
func leavingChains(s State) []chain {
	post := func(kind nftables.ChainType, prio nftables.ChainPriority) hook {
		return hook{kind, "postrouting", *nftables.ChainHookPostrouting, prio, ""}
	}
	clamp := []rule{newRule("mss", intoOverlay(), mssOfRoute())}
	if s.OverlayMTU > ipv6.headers {
		clamp = append(clamp, perFamily(func(f family) rule {
			return newRule("mss", fromOverlay(), ofFamily(f), mss(s.OverlayMTU-f.headers))
		})...)
	}
	// A connection of this node's own finds no smaller way when its gateway moves.
	if s.OverlayMTU > ipv6.headers {
		clamp = append(clamp, perFamily(func(f family) rule {
			return newRule("mss", tagged(), ofFamily(f), mss(s.OverlayMTU-f.headers))
		})...)
	}
	// The link of the pod that this goes to may carry less.
	clamp = append(clamp, newRule("mss", tagged(), mssOfRoute()))
	ports := samePort
	if s.RandomPorts {
		ports = randomPort
	}
	toRange := func(chain, set string) []rule {
		return perFamily(func(f family) rule { return newRule(chain, snatToRange(f, set, ports)) })
	}
	to := func(chain, set string) []rule {
		return perFamily(func(f family) rule { return newRule(chain, snatFrom(f, set+f.digit, ports)) })
	}
	// A block is for the node's own pods.
	translate := append([]rule{newRule("translate_egress", fromOverlay(), enter("translate_last")), newRule("translate_egress", opens())},
		toRange("translate_egress", "block")...)
	translate = append(translate, newRule("translate_egress", intoOverlay(), enter("translate_overlay")), newRule("translate_egress", enter("translate_last")))
	permitted := perFamily(func(f family) rule {
		return newRule("permitted", alive(), saddrIn(f, "permit"+f.digit), saddrIn(f, "sentby"+f.digit), accept())
	})
	// Counting is no condition.
	permitted = append(permitted, perFamily(func(f family) rule { return newRule("permitted", alive(), saddrIn(f, "permit"+f.digit), accept()) })...)
	return []chain{
		// Before every SNAT: the source is the pod's still, and the MSS that of the ways to both ends.
		{"identity", post(nftables.ChainTypeFilter, 0), slices.Concat([]rule{
			newRule("identity", tcpSYN(), jump("mss")),
			leavesForOverlay("identity"),
			newRule("identity", intoOverlay(), enter("to_node")),
			newRule("identity", ctState("new", expr.CtStateBitNEW), forwarded(), jump("opening")),
		}, unmarked())},
		{"mss", hook{}, clamp},
		// An answer to a connection that this node does not know yet goes nowhere.
		{"opening", hook{}, append([]rule{newRule("opening", confirmed(), back())}, perFamily(func(f family) rule {
			return newRule("opening", daddrIn(f, "egressip"+f.digit), count(CounterService), drop())
		})...)},
		unmarkedChain(),
		// Before every other NAT: what is translated here, no CNI masquerades. What cannot be, must not be masqueraded
		// either.
		{"translate", post(nftables.ChainTypeNAT, egress.TranslatePriority), []rule{newRule("translate", tagged(), enter("translate_egress"))}},
		{"translate_egress", hook{}, translate},
		{"translate_overlay", hook{}, slices.Concat(to("translate_overlay", "overlay"), guarded("translate_overlay"))},
		{"translate_last", hook{}, slices.Concat(toRange("translate_last", "shared"), to("translate_last", "snat"), guarded("translate_last"))},
		// After every SNAT: what still is no permitted egress IP never leaves.
		{"guard", post(nftables.ChainTypeFilter, 300), []rule{newRule("guard", tagged(), direction("original", 0), enter("permitted"))}},
		{"permitted", hook{}, slices.Concat([]rule{
			newRule("permitted", intoOverlay(), enter("passing")),
			newRule("permitted", overLimit(markOfConnection, "bandwidth"), count(CounterBandwidth), drop()),
		}, permitted, guarded("permitted"))},
		// Into the overlay goes what was translated here.
		{"passing", hook{}, slices.Concat(perFamily(func(f family) rule { return newRule("passing", saddrIn(f, "pooled"+f.digit), accept()) }),
			perFamily(func(f family) rule { return newRule("passing", fromOverlaySource(f), accept()) }), guarded("passing"))},
	}
}

// guardedFor is for how long an egress IP stays in the set guarded after the chain guard dropped a packet of it.
const guardedFor = 30 * time.Second

// guarded drops what would leave with a wrong source, and adds its egress IP to the set guarded. That is a rule of its
// own: a rule ends where a set is full.
func guarded(chain string) []rule {
	return []rule{newRule(chain, addToGuarded(markOfConnection)), newRule(chain, count(CounterGuard), drop())}
}

// addToGuarded adds the egress IP of a packet to the set guarded.
func addToGuarded(of markSource) term {
	return words(fmt.Sprintf("update @guarded { %s timeout %dms }", of.words, guardedFor.Milliseconds()),
		of.load, &expr.Dynset{SrcRegKey: reg, SetName: "guarded", Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: guardedFor})
}

// unmarked are the rules that lead to what drops what a selected pod sends to the outside without its egress: another
// program has overwritten the mark of the connection, or the packet has its destination from after prerouting, as with
// IPVS, which sends it as the node sends its own. They come before any SNAT: the source is the pod's still.
func unmarked() []rule {
	return perFamily(func(f family) rule { return newRule("identity", saddrIn(f, "selected"+f.digit), enter("unmarked")) })
}

// unmarkedChain lets answers go on to who opened a connection to the pod: to a selected one, for what a pod says of a
// connection to somebody else (an ICMP error, which conntrack relates to it) goes that way, too.
func unmarkedChain() chain {
	r := func(terms ...term) rule { return newRule("unmarked", terms...) }
	return chain{"unmarked", hook{}, slices.Concat(
		perFamily(func(f family) rule { return r(direction("reply", 1), openedTo(f, "selected"+f.digit), accept()) }),
		[]rule{r(tagged(), accept())}, notEgress("unmarked"), []rule{r(count(CounterUnmarked), drop())})}
}

// hostChains keep the node's own services off the egress IPs that this node has as addresses: those are for forwarded
// packets.
func hostChains() []chain {
	return []chain{
		// No service, and no reset of a connection that the kernel does not know: it may be another node's.
		{"input", hook{nftables.ChainTypeFilter, "input", *nftables.ChainHookInput, 0, ""}, perFamily(func(f family) rule {
			return newRule("input", daddrIn(f, "egressip"+f.digit), noICMP(f), count(CounterService), drop())
		})},
	}
}

// neighborRules are for ICMPv6 of this node: nothing that says where an egress IP is goes out without the permit to
// answer for it. Then come the errors.
func neighborRules() []rule {
	nd := []expr.Any{loadMeta(expr.MetaKeyNFPROTO), equals(unix.NFPROTO_IPV6), loadMeta(expr.MetaKeyL4PROTO), equals(unix.IPPROTO_ICMPV6),
		load(expr.PayloadBaseTransportHeader, 0, 1)}
	// The target of a neighbor advertisement (RFC 4861, section 4.4).
	target := load(expr.PayloadBaseTransportHeader, 8, 16)
	source := ipv6.saddr()
	// A solicitation tells its source's link-layer address just as well.
	advertOf := words("icmpv6 type nd-neighbor-advert @th,64,128 @egressip6", append(nd[:len(nd):len(nd)], equals(136), target, in("egressip6"))...)
	solicitOf := words("icmpv6 type nd-neighbor-solicit ip6 saddr @egressip6", append(nd[:len(nd):len(nd)], equals(135), source, in("egressip6"))...)
	advert := words("icmpv6 type nd-neighbor-advert @th,64,128 @egressip6 @th,64,128 != @answer6",
		append(nd[:len(nd):len(nd)], equals(136), target, in("egressip6"), target, notIn("answer6"))...)
	solicit := words("icmpv6 type nd-neighbor-solicit ip6 saddr @egressip6 ip6 saddr != @answer6",
		append(nd[:len(nd):len(nd)], equals(135), source, in("egressip6"), source, notIn("answer6"))...)
	return []rule{
		newRule("neighbor", advert, count(CounterNDP), drop()),
		newRule("neighbor", solicit, count(CounterNDP), drop()),
		newRule("neighbor", ended(), advertOf, count(CounterNDP), drop()),
		newRule("neighbor", ended(), solicitOf, count(CounterNDP), drop()),
		newRule("neighbor", enter("errors")),
	}
}

func arpTable() table {
	// The sender's protocol address of an ARP packet for IPv4 over Ethernet (RFC 826).
	sender := load(expr.PayloadBaseNetworkHeader, 14, 4)
	return table{
		family: nftables.TableFamilyARP, name: egress.TableName,
		sets:     []set{{name: "egressip4", key: address4, size: maxHosted}, {name: "permit4", key: address4, size: maxHosted, permits: true}},
		counters: []string{CounterARP},
		chains: []chain{{"out", hook{nftables.ChainTypeFilter, "output", 1 /* NF_ARP_OUT, linux/netfilter_arp.h */, 0, ""}, []rule{
			newRule("out", words("arp saddr ip @egressip4 arp saddr ip != @permit4", sender, in("egressip4"), sender, notIn("permit4")),
				count(CounterARP), drop()),
			newRule("out", ended(), words("arp saddr ip @egressip4", sender, in("egressip4")), count(CounterARP), drop()),
		}}},
	}
}

// netdevTable says which node a frame in the overlay is for, and answers ARP requests where they come in, before the
// kernel sees them: it would answer for an address of another link only where arp_ignore lets it. So there is one
// answer whatever the sysctls say, and none once the permit is over.
func netdevTable(carriers map[string]Carrier, overlay bool) table {
	t := table{
		family: nftables.TableFamilyNetdev, name: egress.TableName,
		sets: []set{{name: "carried4", key: linked4, size: maxHosted}, {name: "node", key: mark, value: ether, flags: flagMap, size: maxNodes},
			{name: "permit4", key: address4, size: maxHosted, permits: true}},
	}
	if overlay {
		t.chains = append(t.chains, addressNodeChain())
	}
	for _, link := range slices.Sorted(maps.Keys(carriers)) {
		name := "answer_" + link
		t.chains = append(t.chains, chain{name, hook{nftables.ChainTypeFilter, "ingress", *nftables.ChainHookIngress, 0, link},
			[]rule{newRule(name, arpRequest("carried4", "permit4"), alive(), arpReply(carriers[link].MAC), sendBack())}})
	}
	return t
}
