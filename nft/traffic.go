package nft

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Traffic is what has passed this node by an egress IP since the node got it. A packet is one of the kernel's: of those
// that a network card cuts up or puts together, the whole. Bytes are those of the IP packet.
type Traffic struct {
	SentPackets, SentBytes         uint64 // left with the IP as their source, with a permit
	ReceivedPackets, ReceivedBytes uint64 // came for the IP from outside, what is dropped then included
}

// Traffic returns what has passed by each egress IP that this node may send with. A count begins anew when the IP goes
// and comes back, and when the tables are made anew. It is empty when the tables are absent.
//
// Counting takes no rule of its own but for what this node translates: the elements of sets that are looked into in any
// case count.
func (t *Tables) Traffic() (map[netip.Addr]Traffic, error) {
	out := map[netip.Addr]Traffic{}
	inet := table{family: nftables.TableFamilyINet, name: egress.TableName}
	for _, f := range families {
		for _, s := range []struct {
			name string
			add  func(*Traffic, element)
		}{
			{"exit", func(c *Traffic, e element) { c.SentPackets += e.packets; c.SentBytes += e.bytes }},
			{"sentby", func(c *Traffic, e element) { c.SentPackets += e.packets; c.SentBytes += e.bytes }},
			{"hostedip", func(c *Traffic, e element) { c.ReceivedPackets += e.packets; c.ReceivedBytes += e.bytes }},
		} {
			list, err := t.dumpSet(inet, s.name+f.digit)
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return nil, fmt.Errorf("reading what has passed by egress IPs: %w", err)
			}
			for _, e := range list {
				if ip, ok := netip.AddrFromSlice([]byte(e.key)); ok {
					c := out[ip]
					s.add(&c, e)
					out[ip] = c
				}
			}
		}
	}
	return out, nil
}
