package nft

import (
	"fmt"
	"slices"
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// iifKind is NFT_META_IIFKIND of linux/netfilter/nf_tables.h: the kind of the link that a packet comes in by, where it
// has one.
const iifKind = expr.MetaKey(26)

// pairs are the kinds of links (ip -d link) by which nothing but a pod comes to its node, unless the node is a
// container itself.
var pairs = [][]byte{[]byte(linkKey("netkit")), []byte(linkKey("veth"))}

// byPair matches what comes in by such a link.
func byPair() term {
	return term{
		words: `meta iifkind { "netkit", "veth" }`,
		exprs: []expr.Any{loadMeta(iifKind), in(anonymous)},
		sets:  []anonymousSet{setOf(linkKind, pairs...)},
	}
}

// cameFor is for how long a pod may send by a link after that was found to be its own.
const cameFor = time.Second

// steerChains send packets of a selected pod's connections on their way (steer_on), if they come from that pod: else
// whoever can bring a packet with the pod's address to this node would send with its egress IP. The overlay of a CNI
// may take packets from anybody, as flannel's does, and so from pods that a masquerade gives a node's address; and what
// neighbours send is not checked where rp_filter is loose, and of IPv6 nowhere. It is looked at for each packet, not
// only the first of a connection: addresses and ports of one that is open can be guessed. The way back, though, is
// looked up only now and then: that costs more than all else here.
func steerChains() []chain {
	return []chain{
		{"steer", hook{}, slices.Concat(
			perFamily(func(f family) rule { return newRule("steer", cameBy(f), enter("steer_on")) }),
			[]rule{newRule("steer", reversePath("missing"), jump("strange"))},
			perFamily(func(f family) rule { return newRule("steer", ofFamily(f), comesBy(f)) }),
			[]rule{newRule("steer", enter("steer_on"))})},
		// Cilium has another way to its pods than from them. But no pod is where its packets are going to. (What a pod
		// sends in the name of another, Cilium drops.)
		{"strange", hook{}, []rule{
			newRule("strange", byPair(), wayBackBy(ciliumLink), wayOn("missing"), back()),
			newRule("strange", count(CounterForged), drop()),
		}},
		// A connection goes where its own egress is, and only while that is the pod's: conntrack may still have one of
		// before the pod was selected by another, or by none, or of the former pod of the address.
		{"steer_on", hook{}, append(
			perFamily(func(f family) rule { return newRule("steer_on", podMark(f, "meta mark", setMeta(expr.MetaKeyMARK))) }),
			newRule("steer_on", markFromBoth("nexthop"), accept()),
			newRule("steer_on", count(CounterNoNextHop), drop()))},
	}
}

// comesBy remembers by which link a pod sends, cameBy matches what is sent so. Where the set takes no more, the rule
// ends.
func comesBy(f family) term {
	return words(fmt.Sprintf("add @came%s { %s saddr . iif timeout %dms }", f.digit, f.name, cameFor.Milliseconds()),
		append(cameKey(f), &expr.Dynset{SrcRegKey: reg, SetName: "came" + f.digit, Operation: unix.NFT_DYNSET_OP_ADD, Timeout: cameFor})...)
}

func cameBy(f family) term {
	return words(fmt.Sprintf("%s saddr . iif @came%s", f.name, f.digit), slices.Concat(f.is(), cameKey(f), []expr.Any{in("came" + f.digit)})...)
}

func cameKey(f family) []expr.Any {
	return []expr.Any{f.saddr(), &expr.Meta{Key: expr.MetaKeyIIF, Register: register(f.address.Bytes)}}
}

// ciliumLink is the link by which Cilium has the routes to all pods of a node.
const ciliumLink = "cilium_host"

// wayBackBy matches what has a source to which packets without a mark would go by a link.
func wayBackBy(name string) term {
	return words(fmt.Sprintf("fib saddr oifname %q", name),
		&expr.Fib{Register: reg, ResultOIFNAME: true, FlagSADDR: true}, equals([]byte(linkKey(name))...))
}

// toItself are the rules of a chain that drop what a selected pod writes to itself, by a Service, too, in the name of a
// host to which its link does not lead: it would be a connection of that host's, whose answers leave as the pod's own
// address, or by a NodePort as the node's. It comes by the link that it would leave by.
func toItself(chain string) []rule {
	return perFamily(func(f family) rule {
		return newRule(chain, daddrIn(f, "selected"+f.digit), reversePath("missing"), wayOn("exists"), count(CounterForged), drop())
	})
}

// wayOn matches whether a packet would leave, by the routes for packets without a mark, by the link that it came in by:
// "exists" or "missing".
func wayOn(result string) term {
	return words("fib daddr . iif oif "+result,
		&expr.Fib{Register: reg, ResultOIF: true, FlagDADDR: true, FlagIIF: true, FlagPRESENT: true},
		equals(map[string]byte{"exists": 1, "missing": 0}[result], 0, 0, 0))
}
