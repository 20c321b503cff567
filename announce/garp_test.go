package announce

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/arp"
	"github.com/mdlayher/ethernet"
	"github.com/mdlayher/packet"

	"github.com/egret-project/egret/internal/netns"
)

// listen returns what reads ARP frames that come in on a link, until the deadline.
func listen(t *testing.T, link string, deadline time.Duration) func() string {
	t.Helper()
	ifi, err := net.InterfaceByName(link)
	if err != nil {
		t.Fatal(err)
	}
	c, err := packet.Listen(ifi, packet.Raw, int(ethernet.EtherTypeARP), nil)
	if err == nil {
		err = c.SetReadDeadline(time.Now().Add(deadline))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return func() string {
		buf := make([]byte, 1500)
		n, _, err := c.ReadFrom(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return "nothing"
		}
		var f ethernet.Frame
		var p arp.Packet
		if err == nil {
			err = f.UnmarshalBinary(buf[:n])
		}
		if err == nil {
			err = p.UnmarshalBinary(f.Payload)
		}
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%s > %s: op %d hw %d proto %#x, %s is at %s, to %s at %s", f.Source, f.Destination, p.Operation, p.HardwareType,
			p.ProtocolType, p.SenderIP, p.SenderHardwareAddr, p.TargetIP, p.TargetHardwareAddr)
	}
}

const pair = "ip link add eth0 address 02:00:00:00:00:01 type veth peer name peer address 02:00:00:00:00:02"

// up sets both links of the pair up and waits until they send: the kernel notes a while after that their carrier came,
// and until then drops what is sent without a word.
func up(t *testing.T) {
	t.Helper()
	netns.Run(t, "ip link set eth0 up")
	netns.Run(t, "ip link set peer up")
	for end := time.Now().Add(10 * time.Second); strings.Count(netns.Run(t, "ip link"), "state UP") < 2; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("links are not up after 10 s")
		}
	}
}

// TestRealFrames is about what is on the wire, also after the link was made anew.
func TestRealFrames(t *testing.T) {
	netns.Enter(t)
	a := New(Config{Permitted: always})
	a.Set(set("10.0.0.8", "eth0"))
	for _, mac := range []string{"02:00:00:00:00:01", "02:00:00:00:00:03"} {
		netns.Run(t, pair)
		netns.Run(t, "ip link set eth0 address "+mac)
		up(t)
		read := listen(t, "peer", 10*time.Second)
		// Until the first announcement has come, and then until the second has.
		ctx, stop := context.WithCancel(t.Context())
		frames := make(chan []string, 1)
		go func() {
			frames <- []string{read(), read()}
			stop()
		}()
		if err := a.Run(ctx); err != nil {
			t.Fatal(err)
		}
		want := []string{
			mac + " > ff:ff:ff:ff:ff:ff: op 1 hw 1 proto 0x800, 10.0.0.8 is at " + mac + ", to 10.0.0.8 at 00:00:00:00:00:00",
			mac + " > ff:ff:ff:ff:ff:ff: op 2 hw 1 proto 0x800, 10.0.0.8 is at " + mac + ", to 10.0.0.8 at " + mac,
		}
		if diff := cmp.Diff(want, <-frames); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		netns.Run(t, "ip link del eth0")
	}
}

// sendOnce announces an address by a socket of its own.
func sendOnce(link string, ip netip.Addr, permitted func(netip.Addr) bool) error {
	send, end := newSender()
	defer end()
	return send(link, ip, permitted)
}

// TestEachFrameNeedsAPermit takes the permit away between the two frames of an announcement.
func TestEachFrameNeedsAPermit(t *testing.T) {
	netns.Enter(t)
	netns.Run(t, pair)
	up(t)
	read := listen(t, "peer", 10*time.Second)
	asked := 0
	once := func(netip.Addr) bool { asked++; return asked == 1 }
	if err := sendOnce("eth0", netip.MustParseAddr("10.0.0.8"), once); err != nil {
		t.Fatal(err)
	}
	if got := read(); !strings.Contains(got, "op 1") || asked != 2 {
		t.Errorf("asked %d times, sent %s", asked, got)
	}
	if err := sendOnce("eth0", netip.MustParseAddr("10.0.0.9"), always); err != nil {
		t.Fatal(err)
	}
	if got := read(); !strings.Contains(got, "op 1") || !strings.Contains(got, "10.0.0.9 is at") {
		t.Errorf("sent without a permit: %s", got)
	}
}

// TestANeighbourTakesTheNewMACOver is what it is all for: a host that knows the address under another MAC address. The
// two links are in one namespace, so the neighbour's entry is on a link of its own.
func TestANeighbourTakesTheNewMACOver(t *testing.T) {
	netns.Enter(t)
	netns.Run(t, pair)
	netns.Run(t, "ip addr add 10.0.0.200/24 dev peer")
	up(t)
	netns.Run(t, "ip neigh add 10.0.0.8 lladdr 02:00:00:00:00:09 dev peer nud stale")
	if err := sendOnce("eth0", netip.MustParseAddr("10.0.0.8"), always); err != nil {
		t.Fatal(err)
	}
	// The frame waits in a queue of the receiving CPU, and nothing tells when it was dealt with.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		got := netns.Run(t, "ip neigh show dev peer")
		if strings.Contains(got, "10.0.0.8 lladdr 02:00:00:00:00:01") {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the neighbour still has %s", got)
		}
	}
}

func TestALinkThatIsNotThereOrCannotSpeakARPIsNamed(t *testing.T) {
	netns.Enter(t)
	netns.Run(t, pair)
	for link, want := range map[string]string{"eth9": "finding link eth9", "lo": `MAC address ""`, "eth0": "sending ARP on eth0: "} {
		err := sendOnce(link, netip.MustParseAddr("10.0.0.8"), always)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q in it", link, err, want)
		}
	}
}

// A gateway that dies has hundreds of addresses, and who takes them over announces the last of them soon after the
// first: to close a packet socket takes some milliseconds.
func TestHundredsOfAddressesAreAnnouncedByOneSocket(t *testing.T) {
	netns.Enter(t)
	netns.Run(t, pair)
	up(t)
	send, end := newSender()
	const n = 250
	begun := time.Now()
	for i := range n {
		if err := send("eth0", netip.AddrFrom4([4]byte{10, 0, 1, byte(i)}), always); err != nil {
			t.Fatal(err)
		}
	}
	end()
	together := time.Since(begun)
	begun = time.Now()
	for i := range n / 10 {
		if err := sendOnce("eth0", netip.AddrFrom4([4]byte{10, 0, 1, byte(i)}), always); err != nil {
			t.Fatal(err)
		}
	}
	alone := time.Since(begun)
	t.Logf("%d by one socket: %v; %d by a socket each: %v", n, together, n/10, alone)
	if together > 10*alone {
		t.Errorf("%d addresses take %v, ten times fewer by a socket each %v", n, together, alone)
	}
}
