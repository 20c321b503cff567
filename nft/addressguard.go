package nft

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// addressGuardChains are the address guard: they keep what is no egress connection off the egress IPs: as a
// destination, before every DNAT, since a NodePort or a hostPort is one at each address of the node, and, for processes
// of the node, as a source. Of the type nat, they see the first packet of a connection only. (What is in none meets no
// DNAT.)
func addressGuardChains() []chain {
	base := func(name string, num *nftables.ChainHook) hook {
		return hook{nftables.ChainTypeNAT, name, *num, -199 /* the kernel takes no less */, ""}
	}
	noICMP := func(f family) term {
		return words("meta l4proto != "+f.icmp, loadMeta(expr.MetaKeyL4PROTO), differs(f.icmpNum))
	}
	services := func(chain string) []rule {
		return perFamily(func(f family) rule {
			return newRule(chain, daddrIn(f, "egressip"+f.digit), noICMP(f), count(CounterService), drop())
		})
	}
	return []chain{
		{"fence", base("prerouting", nftables.ChainHookPrerouting), services("fence")},
		// No right is needed to bind to an address of the node, or for IPv6 to any. A static egress IP is the node's
		// own, and not in a pool.
		{"fence_out", base("output", nftables.ChainHookOutput), append(services("fence_out"), perFamily(func(f family) rule {
			return newRule("fence_out", ofProcess(), saddrIn(f, "pooled"+f.digit), noICMP(f), count(CounterForged), drop())
		})...)},
	}
}

// forged are the rules that drop what comes in with an egress IP as its source, unless it comes by the link by which
// this node would route to that IP.
func forged(chain string) []rule {
	return perFamily(func(f family) rule {
		return newRule(chain, saddrIn(f, "source"+f.digit), reversePath("missing"), count(CounterForged), drop())
	})
}
