package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/egret-project/egret/check"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/routing"
)

// facts reads what the node knows of itself.
func (a *agent) facts(s *egress.Snapshot) (plan.Facts, error) {
	ip := a.NodeIP
	if !ip.IsValid() {
		n := s.Nodes[a.Node]
		if len(n.Addresses) == 0 {
			return plan.Facts{}, fmt.Errorf("node %s has no address in etcd yet: crdsync writes it, or set --node-ip", a.Node)
		}
		ip = n.Addresses[0]
	}
	links, err := a.kernel.observeAll()
	if err != nil {
		return plan.Facts{}, err
	}
	uplink, err := links.Uplink(ip)
	if err != nil {
		return plan.Facts{}, fmt.Errorf("finding the uplink: %w (--node-ip names another address)", err)
	}
	local := map[netip.Addr]bool{}
	for addr, name := range links.Addresses() {
		if name != egress.AddressLink && !strings.HasPrefix(name, "egret.") {
			local[addr] = true
		}
	}
	f := plan.Facts{
		Node: a.Node, Underlay: ip, Uplink: linkOf(uplink), PoolUplink: a.Uplink, NoVLAN: !slices.Contains(a.record.features, check.VLAN),
		AnswersARP: slices.Contains(a.record.features, check.ARPAnswers), FirstPacketDelay: a.HoldUnknown, Local: local, Except: a.Except, Cluster: a.Cluster,
		RandomPorts: a.RandomPorts,
	}
	for _, l := range links.Others() {
		f.Links = append(f.Links, linkOf(l))
	}
	return f, nil
}

func linkOf(l routing.Link) plan.Link {
	out := plan.Link{Name: l.Name, MTU: l.MTU, Up: l.Up, IPv6: l.HasIPv6(), Prefixes: l.Addrs, VLAN: l.VLAN, Parent: l.Parent}
	if len(l.MAC) == len(out.MAC) { // else it is not Ethernet's
		out.MAC = [6]byte(l.MAC)
	}
	return out
}
