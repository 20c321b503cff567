package agent

import (
	"errors"
	"net/netip"
	"strings"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/fastpath"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/routing"
)

// narrowFast takes from the fast path what it is not to have beside tables, before they are that, and returns the rest:
// what it gets after. It observes once for both: nobody else writes to the maps, and to links that change meanwhile the
// programs are not attached. Where it fails, the programs are detached, since they may have more than the tables are
// about to.
func (k *kernel) narrowFast(tables nft.State) (adds fastpath.Changes, err error) {
	if k.fast == nil {
		return fastpath.Changes{}, nil
	}
	changes, err := k.diffFast(tables)
	if err == nil {
		err = k.applyFast(changes.Removes())
	}
	if err != nil {
		return fastpath.Changes{}, errors.Join(err, k.fast.Detach())
	}
	return changes.Adds(), nil
}

// diffFast returns what makes of the fast path what it is to be beside tables.
func (k *kernel) diffFast(tables nft.State) (fastpath.Changes, error) {
	links, err := k.observeAll()
	if err != nil {
		return fastpath.Changes{}, err
	}
	have, err := k.fast.Observe()
	if err != nil {
		return fastpath.Changes{}, err
	}
	if why := have.Off(); why != k.fastOff {
		if k.fastOff = why; why != "" {
			k.log.Warn("fast path not used", "err", why)
		}
	}
	return fastpath.Diff(have, fastState(tables, links)), nil
}

func (k *kernel) applyFast(changes fastpath.Changes) error {
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
