package announce

import (
	"bytes"
	"net"
	"net/netip"
	"testing"

	"github.com/mdlayher/arp"
	"github.com/mdlayher/ndp"
)

// Whatever a host of the LAN says of who has an address, ARP names an IPv4 address and an advertisement one of IPv6, or
// nothing is concluded from it.
func FuzzNeighbours(f *testing.F) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	ip4, ip6 := netip.MustParseAddr("10.10.0.11"), netip.MustParseAddr("fd10::b1")
	p, err := arp.NewPacket(arp.OperationReply, mac, ip4, mac, ip4)
	if err != nil {
		f.Fatal(err)
	}
	reply, err := p.MarshalBinary()
	if err != nil {
		f.Fatal(err)
	}
	advertisement, err := ndp.MarshalMessage(&ndp.NeighborAdvertisement{
		Override: true, TargetAddress: ip6, Options: []ndp.Option{&ndp.LinkLayerAddress{Direction: ndp.Target, Addr: mac}},
	})
	if err != nil {
		f.Fatal(err)
	}
	if ip, from := parseARP(reply); ip != ip4 || from.String() != mac.String() {
		f.Fatalf("the reply says that %v is at %v, want %v at %v", ip, from, ip4, mac)
	}
	if ip, from := advertised(advertisement); ip != ip6 || from.String() != mac.String() {
		f.Fatalf("the advertisement says that %v is at %v, want %v at %v", ip, from, ip6, mac)
	}
	long, wide := append(bytes.Clone(reply), make([]byte, 24)...), append(bytes.Clone(reply), make([]byte, 4)...)
	long[5] = 16 // bytes of an IP address
	wide[4] = 8  // bytes of a MAC address
	for _, b := range [][]byte{
		nil, long, wide, reply, reply[:20], advertisement, advertisement[:24], append(advertisement[:24:24], 2, 0),
		{0, 1, 8, 0, 255, 255, 0, 2},
	} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if ip, mac := parseARP(b); ip.IsValid() && (!ip.Is4() || len(mac) != 6) {
			t.Errorf("ARP %x says that %v is at %v", b, ip, mac)
		}
		if ip, mac := advertised(b); ip.IsValid() && (!ip.Is6() || len(mac) != 6) {
			t.Errorf("advertisement %x says that %v is at %v", b, ip, mac)
		}
	})
}
