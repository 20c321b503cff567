package agent

import (
	"net/netip"
	"strings"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/fastpath"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/routing"
)

// hasten makes of the fast path what it is to be beside the tables, as far as part goes.
func (k *kernel) hasten(tables nft.State, part func(fastpath.Changes) fastpath.Changes) error {
	if k.fast == nil {
		return nil
	}
	links, err := k.observeAll()
	if err != nil {
		return err
	}
	have, err := k.fast.Observe()
	if err != nil {
		return err
	}
	if why := have.Off(); why != k.fastOff {
		if k.fastOff = why; why != "" {
			k.log.Warn("fast path not used", "err", why)
		}
	}
	changes := part(fastpath.Diff(have, fastState(tables, links)))
	if changes.Empty() {
		return nil
	}
	for line := range strings.Lines(changes.String()) {
		k.log.Debug("kernel changed", "change", strings.TrimRight(line, "\n"))
	}
	return k.fast.Apply(changes)
}

// fastState returns what the fast path has beside tables. It is the zero State where a link that it needs is not there.
func fastState(tables nft.State, links routing.Links) fastpath.State {
	s := fastpath.State{Self: tables.Self, Nodes: tables.Nodes, Ports: fastPorts(tables)}
	uplink, err := links.Uplink(tables.Self)
	if err != nil {
		return fastpath.State{} // package plan says so
	}
	if len(uplink.MAC) != 6 {
		return fastpath.State{} // packets come without an Ethernet header, as those of WireGuard
	}
	s.Uplink = uplink.Index
	for _, l := range links {
		if l.Name == egress.OverlayLink {
			s.Overlay, s.MTU = l.Index, l.MTU
		}
	}
	return s
}

// fastPorts returns the blocks of other nodes that the fast path may forward for: at IPv4 egress IPs of this node
// that leave it by the main table, without a limit.
func fastPorts(tables nft.State) (ports []fastpath.Port) {
	slow, hosted := map[netip.Addr]bool{}, map[netip.Addr]bool{}
	for _, h := range tables.Hosted {
		hosted[h.IP] = true
		if !h.IP.Is4() || h.Mark != egress.LocalMark || h.Limit != (nft.Limit{}) {
			slow[h.IP] = true
		}
	}
	for _, p := range tables.Ports {
		if hosted[p.IP] && !slow[p.IP] {
			ports = append(ports, fastpath.Port{Block: p.Block, Node: p.Node})
		}
	}
	return ports
}

// traffic returns what has passed by the tables and by the fast path.
func traffic(tables *nft.Tables, fast *fastpath.Path) (map[netip.Addr]nft.Traffic, error) {
	all, err := tables.Traffic()
	if err != nil {
		return nil, err
	}
	more, err := fast.Traffic()
	for ip, m := range more {
		if t, ok := all[ip]; ok { // else it has gone meanwhile
			all[ip] = nft.Traffic{
				SentPackets: t.SentPackets + m.SentPackets, SentBytes: t.SentBytes + m.SentBytes,
				ReceivedPackets: t.ReceivedPackets + m.ReceivedPackets, ReceivedBytes: t.ReceivedBytes + m.ReceivedBytes,
			}
		}
	}
	return all, err
}
