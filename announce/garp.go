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

// sendGARP sends an announcement on the link of that name as it is now: it may have been made anew since the last one.
// Without a permit it sends nothing, which is no error.
func sendGARP(link string, ip netip.Addr, permitted func(netip.Addr) bool) error {
	ifi, err := linkByName(link)
	if err != nil {
		return err
	}
	frames, err := garp(ifi.HardwareAddr, ip)
	if err != nil {
		return fmt.Errorf("making ARP frames for link %s with MAC address %q: %w", link, ifi.HardwareAddr, err)
	}
	// Protocol 0: the socket receives nothing.
	c, err := packet.Listen(ifi, packet.Raw, 0, nil)
	if err != nil {
		return fmt.Errorf("opening a packet socket on %s: %w", link, err)
	}
	defer c.Close()
	for _, f := range frames {
		if !permitted(ip) {
			return nil
		}
		if _, err := c.WriteTo(f, &packet.Addr{HardwareAddr: ethernet.Broadcast}); err != nil {
			return fmt.Errorf("sending ARP on %s: %w", link, err)
		}
	}
	return nil
}
