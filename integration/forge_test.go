package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
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
	ip, gateway, pod := n.remote("forge", "10.10.0.59")
	id := idOf(t, "forge")
	const port = 7002
	c := listenOutside(t, port)
	db := map[string]string{}
	for _, node := range nodes() {
		db[node] = n.pod("db-"+node, node, "db")
	}
	// As the pod's node sends: with the egress IP and a port that is that node's; and as one without a block does.
	home := otherNode(gateway)
	to := netip.AddrPortFrom(lab.OutsideIP, port)
	for _, from := range []netip.AddrPort{
		netip.AddrPortFrom(ip, blockOf(t, ip, home).First), netip.AddrPortFrom(egress.OverlaySource(indexOf(t, home), id, ip), port),
	} {
		frame := vxlan(nodeIP(t, home), nodeIP(t, gateway), id, udp4(from, to, "forged"))
		what := fmt.Sprintf("written as %v; the egress IP is %s", from, ip)
		for _, node := range nodes() {
			forge(t, c, [2]string{"pod", db[node]}, node, gateway, frame, what)
			forge(t, c, [2]string{"node", node}, node, gateway, frame, what)
		}
		// The same bytes leave where a node sends them: by its link, past its tables.
		sendsAs(t, c, home, gateway, frame, ip)
	}
	selected(t, pod, ip)
}

// indexOf returns the number of a node by which nodes name each other in packets.
func indexOf(t *testing.T, node string) int {
	t.Helper()
	all := records[egress.Node](t, "nodes")
	i := slices.IndexFunc(all, func(n egress.Node) bool { return n.Name == node })
	if i < 0 || all[i].Index == 0 {
		t.Fatalf("%s has no index: %+v", node, all)
	}
	return all[i].Index
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

// foreign returns the line of the counter of what is for the overlay's port of a node and was dropped on a node.
func foreign(t *testing.T, node string) string {
	t.Helper()
	out, err := cluster.Exec(t.Context(), "node", node, "nft", "list", "counter", "inet", "egret", "overlay_foreign")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

// forge sends a packet of the overlay to a gateway from a place (lab.In) on a node. Nothing is to come out of it at c,
// as it is dropped on that node.
func forge(t *testing.T, c net.PacketConn, at [2]string, node, gateway string, frame []byte, what string) {
	t.Helper()
	before := foreign(t, node)
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
	if foreign(t, node) == before {
		t.Errorf("%s does not drop what %s %s sends, %s", node, at[0], at[1], what)
	}
}

// sendsAs sends a packet of the overlay as a node does, and wants it to come out at c with the egress IP.
func sendsAs(t *testing.T, c net.PacketConn, node, gateway string, frame []byte, ip netip.Addr) {
	t.Helper()
	link := func(node string) (link *net.Interface) {
		if err := cluster.In("node", node, func() (err error) { link, err = net.InterfaceByName("eth0"); return err }); err != nil {
			t.Fatal(err)
		}
		return link
	}
	here, there := link(node), link(gateway)
	packet := udp4(netip.AddrPortFrom(nodeIP(t, node), 50000), netip.AddrPortFrom(nodeIP(t, gateway), egress.OverlayPort), string(frame))
	if err := cluster.In("node", node, func() error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		to := &unix.SockaddrLinklayer{Protocol: 0x0008 /* ETH_P_IP in network byte order */, Ifindex: here.Index, Halen: 6}
		copy(to.Addr[:], there.HardwareAddr)
		return errors.Join(unix.Sendto(fd, packet, 0, to), unix.Close(fd))
	}); err != nil {
		t.Fatal(err)
	}
	if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	_, from, err := c.ReadFrom(make([]byte, 100))
	if err != nil || netip.MustParseAddrPort(from.String()).Addr() != ip {
		t.Errorf("what %s sends comes from %v (%v), want %s", node, from, err, ip)
	}
}

// vxlan returns a VXLAN packet with a group policy id, as from one node to another.
func vxlan(from, to netip.Addr, id egress.ID, ip []byte) []byte {
	b := []byte{0x88, 0x08, 0, 0, 0, 0, egress.OverlayVNI, 0}
	binary.BigEndian.PutUint16(b[2:], uint16(id))
	b = append(append(b, egress.OverlayMAC(to)...), egress.OverlayMAC(from)...)
	return append(append(b, 8, 0), ip...)
}

// udp4 returns an IPv4 packet with a datagram without checksum.
func udp4(from, to netip.AddrPort, payload string) []byte {
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
