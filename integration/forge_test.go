package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
)

// A pod that no egress selects writes packets of the overlay itself, in which it is one that is selected, and sends
// them to the gateway: from another node, where the CNI gives them the node's address, and from the gateway. Nobody
// outside sees one.
func TestNoPodForgesPacketsOfTheOverlay(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("forge", "10.10.0.44")
	id := idOf(t, "forge")
	namespace, name, _ := strings.Cut(pod, "/")
	member := netip.MustParseAddr(kubectl(t, "-n", namespace, "get", "pod", name, "-o", "jsonpath={.status.podIP}"))
	const port = 7002
	c := listenOutside(t, port)
	var places [][2]string
	for _, node := range nodes() {
		places = append(places, [2]string{"pod", n.pod("db-"+node, node, "db")}, [2]string{"node", node})
	}
	// As the pod's node sends: with the egress IP and a port that is that node's; and as one without a block does.
	home := otherNode(gateway)
	to := netip.AddrPortFrom(lab.OutsideIP, port)
	for _, from := range []netip.AddrPort{netip.AddrPortFrom(ip, blockOf(t, ip, home).First), netip.AddrPortFrom(member, port)} {
		frame := vxlan(nodeIP(t, home), nodeIP(t, gateway), id, udp4(from, to))
		for _, at := range places {
			forge(t, c, at, gateway, frame, fmt.Sprintf("written as %v; the egress IP is %s", from, ip))
		}
	}
	selected(t, pod, ip)
}

// listenOutside opens a socket of UDP at the outside host.
func listenOutside(t *testing.T, port uint16) (c net.PacketConn) {
	t.Helper()
	if err := cluster.In("outside", "", func() (err error) {
		c, err = net.ListenPacket("udp", netip.AddrPortFrom(lab.OutsideIP, port).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// idOf returns the id of an egress, blockOf the ports of an egress IP that a node has.
func idOf(t *testing.T, name string) (id egress.ID) {
	t.Helper()
	for _, p := range records[egress.Policy](t, "egresses") {
		if p.Name == name {
			id = p.Addresses[0].ID
		}
	}
	return id
}

func blockOf(t *testing.T, ip netip.Addr, node string) egress.Block {
	t.Helper()
	blocks := records[egress.Block](t, "blocks")
	i := slices.IndexFunc(blocks, func(b egress.Block) bool { return b.IP == ip && b.Node == node })
	if i < 0 {
		t.Fatalf("%s has no ports of %s: %+v", node, ip, blocks)
	}
	return blocks[i]
}

// forge sends a packet of the overlay to a node from a place (lab.In), and wants nothing to come out of it at c.
func forge(t *testing.T, c net.PacketConn, at [2]string, gateway string, frame []byte, what string) {
	t.Helper()
	err := cluster.In(at[0], at[1], func() error {
		c, err := net.Dial("udp", netip.AddrPortFrom(nodeIP(t, gateway), egress.OverlayPort).String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(frame)
		return err
	})
	if err != nil && !errors.Is(err, unix.EPERM) {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, seen, err := c.ReadFrom(make([]byte, 100)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s %s sends as %v (%v), %s", at[0], at[1], seen, err, what)
	}
}

// vxlan returns a VXLAN packet with a group policy id, as from one node to another.
func vxlan(from, to netip.Addr, id egress.ID, ip []byte) []byte {
	b := []byte{0x88, 0, 0, 0, 0, 0, egress.OverlayVNI, 0}
	binary.BigEndian.PutUint16(b[2:], uint16(id))
	b = append(append(b, egress.OverlayMAC(to)...), egress.OverlayMAC(from)...)
	return append(append(b, 8, 0), ip...)
}

// udp4 returns an IPv4 packet with a datagram without checksum.
func udp4(from, to netip.AddrPort) []byte {
	payload := "forged"
	b := []byte{0x45, 0, 0, byte(28 + len(payload)), 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	b = append(append(b, from.Addr().AsSlice()...), to.Addr().AsSlice()...)
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum+sum>>16))
	b = binary.BigEndian.AppendUint16(b, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	return append(append(b, 0, byte(8+len(payload)), 0, 0), payload...)
}

// refuses checks that nobody answers TCP connections to an address, from any of the places (lab.In), all at once.
func refuses(t *testing.T, what string, to netip.Addr, port int, from ...[2]string) {
	t.Helper()
	done := make(chan error)
	for _, at := range from {
		go func() {
			done <- func() error {
				var c net.Conn
				err := cluster.In(at[0], at[1], func() (err error) {
					c, err = net.DialTimeout("tcp", netip.AddrPortFrom(to, uint16(port)).String(), 500*time.Millisecond)
					return err
				})
				var timeout net.Error
				switch {
				case err == nil:
					_ = c.Close() // what is said is said
					return fmt.Errorf("%s, %s port %d, answers from %v", what, to, port, at)
				case errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, unix.EPERM):
					return nil
				}
				return err
			}()
		}()
	}
	for range from {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
