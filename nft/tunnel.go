package nft

import "github.com/google/nftables/expr"

// iifKind is NFT_META_IIFKIND of linux/netfilter/nf_tables.h: the kind of the link that a packet comes in by.
const iifKind = expr.MetaKey(26)

// tunnels are the kinds of links by which CNIs bring packets of other nodes' pods (ip -d link). What brings them proves nothing of their source.
var tunnels = [][]byte{kindKey("geneve"), kindKey("ip6tnl"), kindKey("ipip"), kindKey("sit"), kindKey("vxlan")}

func kindKey(name string) []byte { return []byte(linkKey(name)) }

// byTunnel matches what comes in by such a link.
func byTunnel() term {
	return term{
		words: `meta iifkind { "geneve", "ip6tnl", "ipip", "sit", "vxlan" }`,
		exprs: []expr.Any{loadMeta(iifKind), in(anonymous)},
		sets:  []anonymousSet{setOf(linkKind, tunnels...)},
	}
}

// elsewhere is the rule that drops a new connection in the name of a selected pod that comes from another node: this node's own pods are never that
// far. A CNI's overlay may take packets from anybody, as flannel's does, and so from pods that a masquerade gives a node's address.
func elsewhere(chain string) []rule {
	return []rule{newRule(chain, tagged(), byTunnel(), count(CounterForged), drop())}
}
