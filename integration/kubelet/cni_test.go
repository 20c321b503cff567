package kubelet

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/integration/lab"
)

// What the cluster's CNI does beside Egret. Most of it is as well tested with the lab's own CNI; that a CNI is
// restarted is with flannel alone.
var cni = flag.String("cni", lab.CNIBridge, "CNI of the cluster: "+strings.Join(lab.CNIs(), ", "))

// ips returns a pod's addresses.
func (c *cluster) ips(p pod) []netip.Addr {
	c.t.Helper()
	namespace, name, _ := strings.Cut(p.name, "/")
	var all []netip.Addr
	for _, text := range strings.Fields(c.kubectl("-n", namespace, "get", "pod", name, "-o", "jsonpath={.status.podIPs[*].ip}")) {
		ip, err := netip.ParseAddr(text)
		if err != nil {
			c.t.Fatalf("addresses of %s: %v", p.name, err)
		}
		all = append(all, ip)
	}
	return all
}

// carry has a pod connect to another one at one of its addresses, and take much from it: segments that fill the link.
// It returns the source that the other one saw.
func (c *cluster) carry(from, to pod, at netip.Addr) (netip.Addr, error) {
	const much, within = 4 << 20, 20 * time.Second
	var listener net.Listener
	err := c.lab.In("pod", to.name, func() (err error) {
		listener, err = net.Listen("tcp", netip.AddrPortFrom(at, 0).String())
		return err
	})
	if err != nil {
		return netip.Addr{}, err
	}
	defer listener.Close()
	var conn net.Conn
	err = c.lab.In("pod", from.name, func() (err error) {
		conn, err = net.DialTimeout("tcp", listener.Addr().String(), within)
		return err
	})
	if err != nil {
		return netip.Addr{}, err
	}
	defer conn.Close()
	server, err := listener.Accept()
	if err != nil {
		return netip.Addr{}, err
	}
	defer server.Close()
	deadline := time.Now().Add(within)
	if err := errors.Join(conn.SetDeadline(deadline), server.SetDeadline(deadline)); err != nil {
		return netip.Addr{}, err
	}
	sent := make(chan error, 1)
	go func() {
		_, err := server.Write(make([]byte, much))
		sent <- errors.Join(err, server.Close())
	}()
	n, err := io.Copy(io.Discard, conn)
	err = errors.Join(err, <-sent)
	if err == nil && n != much {
		err = fmt.Errorf("%d of %d bytes arrived", n, much)
	}
	return server.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(), err
}

// amongPods has pods that an egress selects reach pods of all nodes, with their own addresses.
func amongPods(t *testing.T, c *cluster) {
	pods := c.webs()
	for _, from := range pods["egress-prod-web"] {
		own := c.ips(from)
		for _, to := range append(c.pods("prod", "db"), pods["egress-staging-web"]...) {
			for _, at := range c.ips(to) {
				seen, err := c.carry(from, to, at)
				if err != nil || !slices.Contains(own, seen) {
					t.Errorf("%s on %s to %s on %s at %v: seen as %v, error %v, want one of %v", from.name, from.node, to.name, to.node, at, seen, err, own)
				}
			}
		}
	}
}

// sixth has an IPv6 egress serve the pods that the guide's do not select. It is there until the end.
func sixth(t *testing.T, c *cluster) {
	if len(lab.NodeIPs(1)) < 2 {
		t.Skip("the kernel has no IPv6")
	}
	c.kubectl("apply", "-f", c.file("testdata/ipv6.yaml"))
	ip, node := c.gateway("egress-prod-db")
	t.Logf("egress-prod-db: %v on %s", ip, node)
	for _, p := range c.pods("prod", "db") {
		deadline := time.Now().Add(20 * time.Second)
		for {
			seen, err := c.lab.SourceTo(t.Context(), p.name, lab.OutsideIP6)
			if err == nil && seen == ip {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("IPv6 source of %s on %s outside: got %v, error %v, want %v", p.name, p.node, seen, err, ip)
			}
			time.Sleep(100 * time.Millisecond)
		}
		c.leaves([]pod{p}, c.nodeIP(p.node), 5*time.Second) // by IPv4 no egress selects it
	}
	out, err := c.operator("status")
	t.Logf("egret status: %v\n%s", err, out)
}

// restartedCNI replaces flannel's pods on all nodes. It looks for a node's address anew then, and must not take for it
// what a gateway's link has of egress IPs.
func restartedCNI(t *testing.T, c *cluster) {
	if *cni == lab.CNIBridge {
		t.Skip("the lab's own CNI is no process")
	}
	before := c.addressesOfFlannel()
	tenures := map[netip.Addr][]string{}
	var ends []func()
	for egress, pods := range c.webs() {
		ip, _ := c.gateway(egress)
		tenures[ip] = c.tenures(ip)
		ends = append(ends, c.lookedAt(pods, ip))
	}
	c.kubectl("-n", "kube-flannel", "rollout", "restart", "daemonset/kube-flannel-ds")
	c.kubectl("-n", "kube-flannel", "rollout", "status", "daemonset/kube-flannel-ds", "--timeout=180s")
	for _, end := range ends {
		end()
	}
	if diff := cmp.Diff(before, c.addressesOfFlannel()); diff != "" {
		t.Errorf("the nodes' addresses, as flannel has them (-before its restart +after):\n%s", diff)
	}
	for _, ip := range slices.SortedFunc(maps.Keys(tenures), netip.Addr.Compare) {
		if diff := cmp.Diff(tenures[ip], c.tenures(ip)); diff != "" {
			t.Errorf("who held %v (-before +after):\n%s", ip, diff)
		}
	}
	amongPods(t, c)
}

// addressesOfFlannel returns, a line a node, where flannel has the other nodes send what is for that node's pods.
func (c *cluster) addressesOfFlannel() []string {
	c.t.Helper()
	const prefix = `.metadata.annotations.flannel\.alpha\.coreos\.com/public-ip`
	out := c.kubectl("get", "nodes", "-o", `jsonpath={range .items[*]}{.metadata.name} {`+prefix+`} {`+prefix+`v6}{"\n"}{end}`)
	lines := strings.Split(out, "\n")
	if len(lines) != len(nodes()) || !strings.Contains(lines[0], c.nodeIP(nodes()[0]).String()) {
		c.t.Fatalf("flannel's annotations of the nodes: got %q, want the address of each", lines)
	}
	return lines
}
