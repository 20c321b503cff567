package integration

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/egret-project/egret/integration/lab"
)

// TestANewGatewayAsksForTheNextHopAtOnce: a node that asks for it in the name of the egress IP, which the tables drop
// before it may answer for that, asks again a second later. So a pod of the node sends when the address comes.
func TestANewGatewayAsksForTheNextHopAtOnce(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("next-hop", "10.10.0.91")
	node := otherNode(gateway)
	for range 5 {
		on(t, node, "ip neigh flush dev eth0")
		came, done := make(chan netlink.AddrUpdate, 10), make(chan struct{})
		if err := cluster.In("node", node, func() error { return netlink.AddrSubscribe(came, done) }); err != nil {
			t.Fatal(err)
		}
		answered := make(chan error, 1)
		go func() {
			answered <- cluster.In("pod", pod, func() error { return sendWhen(came, ip, 900*time.Millisecond) })
		}()
		egret(t, "move", ip.String(), "--to", node)
		if err := <-answered; err != nil {
			t.Error(err)
		}
		close(done)
		egret(t, "move", ip.String(), "--to", gateway)
	}
}

// sendWhen waits until an address comes to a link, sends a datagram a millisecond to the outside host, and wants an
// answer within some time.
func sendWhen(came <-chan netlink.AddrUpdate, ip netip.Addr, within time.Duration) error {
	c, err := net.Dial("udp", netip.AddrPortFrom(lab.OutsideIP, lab.EchoPort).String())
	if err != nil {
		return err
	}
	defer c.Close()
	for limit := time.After(10 * time.Second); ; {
		select {
		case u := <-came:
			if is, _ := netip.AddrFromSlice(u.LinkAddress.IP); is.Unmap() != ip || !u.NewAddr {
				continue
			}
		case <-limit:
			return fmt.Errorf("%s has come to no link", ip)
		}
		break
	}
	answer := make([]byte, 100)
	for began := time.Now(); ; {
		if _, err := c.Write([]byte("next")); err != nil {
			return err
		}
		_ = c.SetReadDeadline(time.Now().Add(time.Millisecond)) // it cannot fail
		_, err := c.Read(answer)
		var timeout net.Error
		switch took := time.Since(began); {
		case err == nil && took < within:
			return nil
		case err == nil:
			return fmt.Errorf("the first answer took %v", took)
		case !errors.As(err, &timeout) || !timeout.Timeout() || took > 5*time.Second:
			return err
		}
	}
}
