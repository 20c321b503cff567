package monitor

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/connlimit"
	"github.com/egret-project/egret/internal/netns"
)

// kube-proxy sets route_localnet=1 for NodePorts on loopback, and then the kernel takes packets to 127.0.0.1 from links
// (CVE-2020-8558): from a pod of the node, and from a neighbour on its LAN.
func TestAPodReachesTheLoopbackAddressByRouteLocalnetInVain(t *testing.T) {
	netns.Enter(t)
	pod := fmt.Sprintf("egret-status-%d", os.Getpid())
	netns.Run(t, "ip netns add "+pod)
	defer netns.Run(t, "ip netns del "+pod)
	netns.RunAll(t, "", `
		ip link add dev cali1 type veth peer name eth0 netns `+pod+`
		ip addr add 10.244.0.1/24 dev cali1
		ip link set dev cali1 up
		sysctl -qw net.ipv4.conf.all.route_localnet=1
		sysctl -qw net.ipv4.conf.all.rp_filter=0`)
	netns.RunAll(t, pod, `
		ip addr add 10.244.0.2/24 dev eth0
		ip link set dev eth0 up
		sysctl -qw net.ipv4.conf.all.route_localnet=1
		sysctl -qw net.ipv4.conf.all.rp_filter=0
		ip route add 127.0.0.1 via 10.244.0.1 dev eth0 src 10.244.0.2`)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	open, err := net.Listen("tcp", "127.0.0.1:8480")
	if err != nil {
		t.Fatal(err)
	}
	closed, err := net.Listen("tcp", "127.0.0.1:8481")
	if err != nil {
		t.Fatal(err)
	}
	server := New(Config{})
	for _, l := range []net.Listener{open, connlimit.New(closed, maxLocal, isLoopback)} {
		go func() { _ = serveOn(ctx, l, server.live, server.Log) }() // ends with the test
	}
	answer := func(from, to string) (text string, err error) {
		look := func() error {
			c, err := net.DialTimeout("tcp", to, 10*time.Second)
			if err != nil {
				return err
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			_, _ = io.WriteString(c, "GET /healthz HTTP/1.0\r\n\r\n") // it may be closed already: the answer says it
			b, _ := io.ReadAll(c)
			text = string(b)
			return nil
		}
		if from == "" {
			return text, look()
		}
		err = netns.Do(from, look)
		return text, err
	}
	if text, err := answer(pod, "127.0.0.1:8480"); err != nil || !strings.Contains(text, "200 OK") {
		t.Fatalf("the attack reaches no other server either: %q, %v", text, err)
	}
	if text, err := answer(pod, "127.0.0.1:8481"); text != "" {
		t.Errorf("a pod was answered: %q, %v", text, err)
	}
	if text, err := answer(pod, "10.244.0.1:8481"); text != "" || err == nil {
		t.Errorf("a pod was answered at the node's address: %q", text)
	}
	if text, err := answer("", "127.0.0.1:8481"); err != nil || !strings.Contains(text, "ok") {
		t.Errorf("the node itself was not answered: %q, %v", text, err)
	}
}
