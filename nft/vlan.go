package nft

import (
	"fmt"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// The agent has made the links of VLANs for the egress IPs there and for nothing else. Without what follows every host
// of a VLAN would have a way to the node and its pods that it did not have before, past the routers between. What comes
// out of the overlay, whose name begins likewise, has to be elsewhere by then.

// subnetChain is for what comes in by the link of a VLAN, before conntrack. What is for no egress IP that this node
// has, or relays for, there goes nowhere, of whatever connection it says to be: who writes the addresses of one of the
// node's into his packets, as of the CNI's overlay or of an egress IP elsewhere, would be taken for its other end. Who
// is where there is asked for and told by NDP, and queriers ask for the groups by which a switch knows who hears that
// (MLD). Nobody is a router.
func subnetChain() chain {
	return chain{"subnet", hook{}, append(perFamily(func(f family) rule {
		return newRule("subnet", words(fmt.Sprintf("iifname . %s daddr @vlanip%s", f.name, f.digit), append(f.is(), loadMeta(expr.MetaKeyIIFNAME),
			&expr.Payload{DestRegister: register(unix.IFNAMSIZ), Base: expr.PayloadBaseNetworkHeader, Offset: f.source + f.address.Bytes, Len: f.address.Bytes},
			in("vlanip"+f.digit))...), back())
	}),
		newRule("subnet", neighbors(), localType(), back()),
		newRule("subnet", count(CounterSubnet), drop()))}
}

// neighbors matches what hosts of one link say to each other of who is there.
func neighbors() term {
	return term{
		words: "icmpv6 type { mld-listener-query, nd-neighbor-solicit, nd-neighbor-advert }",
		exprs: append(ipv6.is(), loadMeta(expr.MetaKeyL4PROTO), equals(unix.IPPROTO_ICMPV6), load(expr.PayloadBaseTransportHeader, 0, 1), in(anonymous)),
		sets:  []anonymousSet{setOf(icmpv6Type, []byte{130}, []byte{135}, []byte{136})},
	}
}

// fromSubnet are rules of a chain for what begins at a host of a VLAN: that is for an egress IP which this node answers
// for. terms choose further.
func fromSubnet(chain string, terms ...term) []rule {
	return perFamily(func(f family) rule {
		set := "egressip" + f.digit
		all := append([]term{byVLAN()}, terms...)
		return newRule(chain, append(all, words(fmt.Sprintf("%s daddr != @%s", f.name, set), append(f.is(), f.daddr(), notIn(set))...),
			count(CounterSubnet), drop())...)
	})
}

// byVLAN matches what comes in by a link that has a name as those of VLANs.
func byVLAN() term {
	return words(fmt.Sprintf("iifname %q", egress.VLANLinkPrefix+"*"), loadMeta(expr.MetaKeyIIFNAME), equals([]byte(egress.VLANLinkPrefix)...))
}
