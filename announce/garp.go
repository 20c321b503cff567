package announce

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ethernet"
	"github.com/mdlayher/packet"
)

// garp returns the two frames of an announcement of ip by mac.
func garp(mac net.HardwareAddr, ip netip.Addr) (frames [][]byte, err error) {
	for _, form := range []struct {
		op     arp.Operation
		target net.HardwareAddr
	}{
		{arp.OperationRequest, make(net.HardwareAddr, len(mac))}, // RFC 5227, section 2.3: as in a probe, all zero
		// RFC 5944, section 4.6; Linux takes a reply for gratuitous only so
		{arp.OperationReply, mac},
	} {
		p, err := arp.NewPacket(form.op, mac, ip, form.target, ip)
		if err != nil {
			return nil, err
		}
		b, err := p.MarshalBinary()
		if err != nil {
			return nil, err
		}
		f := ethernet.Frame{Destination: ethernet.Broadcast, Source: mac, EtherType: ethernet.EtherTypeARP, Payload: b}
		if b, err = f.MarshalBinary(); err != nil {
			return nil, err
		}
		frames = append(frames, b)
	}
	return frames, nil
}

// garpSender sends announcements by ARP, by one socket for each link: one that is closed is waited for until the kernel
// is sure that nothing looks at it any more, which is milliseconds, and hundreds of addresses may come at once.
type garpSender struct {
	links map[string]garpLink
}

type garpLink struct {
	*net.Interface
	conn *packet.Conn
}

// send sends an announcement on the link of that name, as it was at the first one. Without a permit it sends nothing,
// which is no error.
func (s *garpSender) send(link string, ip netip.Addr, permitted func(netip.Addr) bool) error {
	l, err := s.open(link)
	if err != nil {
		return err
	}
	frames, err := garp(l.HardwareAddr, ip)
	if err != nil {
		return fmt.Errorf("making ARP frames for link %s with MAC address %q: %w", link, l.HardwareAddr, err)
	}
	for _, f := range frames {
		if !permitted(ip) {
			return nil
		}
		if _, err := l.conn.WriteTo(f, &packet.Addr{HardwareAddr: ethernet.Broadcast}); err != nil {
			return fmt.Errorf("sending ARP on %s: %w", link, err)
		}
	}
	return nil
}

func (s *garpSender) open(link string) (l garpLink, err error) {
	if l, ok := s.links[link]; ok {
		return l, nil
	}
	if l.Interface, err = linkByName(link); err != nil {
		return l, err
	}
	// Protocol 0: the socket receives nothing.
	if l.conn, err = packet.Listen(l.Interface, packet.Raw, 0, nil); err != nil {
		return l, fmt.Errorf("opening a packet socket on %s: %w", link, err)
	}
	if s.links == nil {
		s.links = map[string]garpLink{}
	}
	s.links[link] = l
	return l, nil
}

func (s *garpSender) close() {
	for _, l := range s.links {
		l.conn.Close()
	}
}

// newSender returns what announces addresses of either family on links as they are now, until end is called: a link may
// be made anew in between.
func newSender() (send func(link string, ip netip.Addr, permitted func(netip.Addr) bool) error, end func()) {
	s := new(garpSender)
	send = func(link string, ip netip.Addr, permitted func(netip.Addr) bool) error {
		if ip.Is4() {
			return s.send(link, ip, permitted)
		}
		return sendNA(link, ip, permitted)
	}
	return send, s.close
}
