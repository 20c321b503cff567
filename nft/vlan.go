package nft

import (
	"fmt"

	"github.com/google/nftables/expr"

	"github.com/egret-project/egret/egress"
)

// fromSubnet are rules of a chain for what comes in by the link of a VLAN, which the agent has made for the egress IPs there and for nothing else: without
// them every host of the VLAN would have a way to the node and its pods that it did not have before, past the routers between. What begins there
// is for an egress IP, or for nobody. terms choose further; what comes out of the overlay, whose name begins likewise, has to be elsewhere.
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
