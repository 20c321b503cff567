package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

// The addresses that the outside host has in this test besides its own: in an exception, and in the Service CIDRs.
var (
	exceptCIDRs = []string{"198.51.100.0/24", "2001:db8:51::/48"}
	excepted    = []netip.Addr{netip.MustParseAddr("198.51.100.10"), netip.MustParseAddr("2001:db8:51::10")}
	unassigned  = []netip.Addr{netip.MustParseAddr("10.96.200.10"), netip.MustParseAddr("fd96::beef")}
	balanced    = []netip.Addr{netip.MustParseAddr("10.10.0.240"), netip.MustParseAddr("fd10::240")}
)

// TestBesideKubeProxy runs kube-proxy on every node, where rp_filter is strict, ARP is as for IPVS, and a CNI
// masquerades.
func TestBesideKubeProxy(t *testing.T) {
	ctx := t.Context()
	l, err := lab.Up(ctx, lab.Config{Name: lab.OwnName("e2e-proxy"), Nodes: 2, LeaseTTL: leaseTTL, AgentFlags: []string{"--egress.exceptCIDRs", strings.Join(exceptCIDRs, ",")}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	shared := cluster
	cluster = l
	defer func() { cluster = shared }()
	on := func(kind, name, line string) {
		t.Helper()
		if out, err := l.Exec(ctx, kind, name, strings.Fields(line)...); err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
	}
	both := []string{"node-1", "node-2"}
	for _, node := range both {
		on("node", node, "sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2")
	}
	for _, ip := range append(excepted[:2:2], unassigned...) {
		on("outside", "", fmt.Sprintf("ip addr add %s/%d dev lo", ip, ip.BitLen()))
	}
	n := &namespace{t: t, name: "proxy"}
	n.dual("both", "10.10.0.30", "fd10::30")
	ips := bothIPs(t, "both")
	_, gateway := held(t, "both")
	elsewhere := "node-1"
	if gateway == elsewhere {
		elsewhere = "node-2"
	}
	server := map[string]lab.Pod{}
	pod := func(name, node, app string) string {
		t.Helper()
		p, err := l.Pod(ctx, lab.PodConfig{Name: n.name + "/" + name, Node: node, Labels: map[string]string{"app": app}})
		if err != nil {
			t.Fatal(err)
		}
		server[p.Name] = p
		serve(t, "pod", p.Name)
		return p.Name
	}
	web := []string{pod("web", elsewhere, "web"), pod("web-local", gateway, "web")} // all are selected
	db := pod("db", gateway, "db")
	serve(t, "node", gateway)

	direct := func(t *testing.T) {
		t.Helper()
		for i, ip := range ips {
			for _, p := range web {
				leavesAs(t, p, ip)
				node, _ := l.NodeNumber(server[p].Node)
				sees(t, "a destination of egress.exceptCIDRs", p, excepted[i], lab.EchoPort, lab.NodeIPs(node)[i])
			}
		}
	}
	direct(t)
	for i := range ips {
		for _, p := range web {
			node, _ := l.NodeNumber(server[p].Node)
			sees(t, "a destination of the ServiceCIDRs", p, unassigned[i], lab.EchoPort, lab.NodeIPs(node)[i])
		}
		// Node addresses: the CNI has its way with them.
		g, _ := l.NodeNumber(gateway)
		from, _ := l.NodeNumber(elsewhere)
		sees(t, "a node's address", web[0], lab.NodeIPs(g)[i], servePort, lab.NodeIPs(from)[i])
		sees(t, "a pod of another node", web[0], server[db].IPs[i], servePort, server[web[0]].IPs[i])
	}
	services(t, n.name, server[web[0]])
	for i, ip := range balanced {
		on("outside", "", fmt.Sprintf("ip route add %s via %s", ip, lab.NodeIPs(1)[i]))
	}

	for _, mode := range []string{"nftables", "iptables"} {
		t.Run(mode, func(t *testing.T) {
			var stop []func()
			for _, node := range both {
				stop = append(stop, kubeProxy(t, mode, node))
			}
			direct(t)
			for i, ip := range ips {
				family := fmt.Sprint(4 + 2*i)
				for _, p := range web {
					sees(t, "a Service whose endpoint is outside", p, clusterIP(t, n.name, "outside"+family), lab.EchoPort, ip)
				}
				sees(t, "a Service whose endpoint is a pod", web[1], clusterIP(t, n.name, "web"+family), servePort, server[web[1]].IPs[i])
				for number := range both {
					node := lab.NodeIPs(number + 1)[i]
					reaches(t, "a NodePort of node "+node.String(), node, nodePort(t, n.name, "web"+family), netip.Addr{})
				}
				at, _ := l.NodeNumber(elsewhere)
				client := netip.MustParseAddr([]string{"10.10.0.200", "fd10::200"}[i])
				reaches(t, "a NodePort whose traffic is local", lab.NodeIPs(at)[i], nodePort(t, n.name, "local"+family), client)
				reaches(t, "a LoadBalancer", balanced[i], servePort, netip.Addr{})
				refuses(t, "a NodePort at the egress IP", ip, nodePort(t, n.name, "web"+family),
					[2]string{"outside", ""}, [2]string{"pod", db}, [2]string{"pod", web[0]}, [2]string{"pod", web[1]}, [2]string{"node", gateway}, [2]string{"node", elsewhere})
			}
			for _, f := range stop {
				f()
			}
			direct(t)
		})
	}
	t.Run("what another program translates first is dropped, and the Egress says so", func(t *testing.T) {
		at, _ := l.NodeNumber(elsewhere)
		script := fmt.Sprintf("add table ip other; add chain ip other post { type nat hook postrouting priority -199; }; "+
			"add rule ip other post ip saddr %s snat to %s", server[web[0]].IPs[0], lab.NodeIPs(at)[0])
		nft := func(script string) {
			t.Helper()
			if out, err := l.Exec(ctx, "node", elsewhere, "nft", script); err != nil {
				t.Fatalf("%s: %v\n%s", script, err, out)
			}
		}
		nft(script)
		want := fmt.Sprintf("True TrafficDropped node %s: %s: ", elsewhere, ips[0])
		eventually(t, time.Minute, func() error {
			if got, err := ask("pod", web[0], lab.OutsideIP, lab.EchoPort); err == nil {
				t.Errorf("a packet left, and was seen as %v", got)
			}
			if got := condition(t, "both", "Degraded"); !strings.HasPrefix(got, want) || !strings.Contains(got, "chain ip other post at priority -199") {
				return fmt.Errorf("condition %q, want %q and the chain", got, want)
			}
			return nil
		})
		nft("delete table ip other")
		eventually(t, time.Minute, func() error {
			if got := condition(t, "both", "Degraded"); strings.HasPrefix(got, "True") {
				return fmt.Errorf("condition %q still", got)
			}
			return nil
		})
		direct(t)
	})
}

// servePort is where serve listens.
const servePort = 8000

// serve answers TCP connections in a namespace of the lab (lab.In) with the address that they come from.
func serve(t *testing.T, kind, name string) {
	t.Helper()
	var ln net.Listener
	err := cluster.In(kind, name, func() (err error) {
		ln, err = net.Listen("tcp", fmt.Sprint(":", servePort))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return // closed
			}
			fmt.Fprintln(c, c.RemoteAddr()) // who asks notices what fails
			c.Close()
		}
	}()
}

// ask connects from a namespace and returns the address that the other side sees.
func ask(kind, name string, to netip.Addr, port int) (netip.Addr, error) {
	var c net.Conn
	err := cluster.In(kind, name, func() (err error) {
		c, err = net.DialTimeout("tcp", netip.AddrPortFrom(to, uint16(port)).String(), time.Second)
		return err
	})
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	err = c.SetDeadline(time.Now().Add(time.Second))
	b, err2 := io.ReadAll(c)
	seen, err3 := netip.ParseAddrPort(strings.TrimSpace(string(b)))
	return seen.Addr().Unmap(), errors.Join(err, err2, err3)
}

// sees waits until a pod is seen at a destination with the source want.
func sees(t *testing.T, what, pod string, to netip.Addr, port int, want netip.Addr) {
	t.Helper()
	eventually(t, 15*time.Second, func() error {
		if got, err := ask("pod", pod, to, port); err != nil || got != want {
			return fmt.Errorf("%s, %s port %d, from pod %s: seen as %v (%v), want %s", what, to, port, pod, got, err, want)
		}
		return nil
	})
}

// reaches waits until the outside host gets an answer, and is seen with the source want where that is valid.
func reaches(t *testing.T, what string, to netip.Addr, port int, want netip.Addr) {
	t.Helper()
	eventually(t, 15*time.Second, func() error {
		if got, err := ask("outside", "", to, port); err != nil || want.IsValid() && got != want {
			return fmt.Errorf("%s, %s port %d, from outside: seen as %v (%v), want %v", what, to, port, got, err, want)
		}
		return nil
	})
}

// services makes, for each family, the Services outside (an endpoint that is no pod), web and local (the pod).
func services(t *testing.T, namespace string, pod lab.Pod) {
	t.Helper()
	var items []any
	for i, ip := range pod.IPs {
		digit, family, outside := "4", "IPv4", lab.OutsideIP
		if ip.Is6() {
			digit, family, outside = "6", "IPv6", lab.OutsideIP6
		}
		add := func(name string, endpoint netip.Addr, port int, spec map[string]any) {
			name += digit
			spec["ports"], spec["ipFamilies"] = []any{map[string]any{"name": "tcp", "port": port, "targetPort": port}}, []any{family}
			meta := map[string]any{"name": name, "namespace": namespace}
			where := map[string]any{"addresses": []any{endpoint.String()}, "conditions": map[string]any{"ready": true}, "nodeName": pod.Node}
			items = append(items, map[string]any{"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec},
				map[string]any{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family, "endpoints": []any{where},
					"ports":    []any{map[string]any{"name": "tcp", "port": port}},
					"metadata": map[string]any{"name": name, "namespace": namespace, "labels": map[string]any{"kubernetes.io/service-name": name}}})
		}
		add("outside", outside, lab.EchoPort, map[string]any{"type": "ClusterIP"})
		add("web", ip, servePort, map[string]any{"type": "LoadBalancer"})
		add("local", ip, servePort, map[string]any{"type": "NodePort", "externalTrafficPolicy": "Local"})
		defer func() {
			kubectl(t, "-n", namespace, "patch", "service", "web"+digit, "--subresource=status", "--type=merge", "-p",
				fmt.Sprintf(`{"status": {"loadBalancer": {"ingress": [{"ip": %q, "ipMode": "VIP"}]}}}`, balanced[i]))
		}()
	}
	b, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": items})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "services.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	kubectl(t, "apply", "-f", file)
}

func clusterIP(t *testing.T, namespace, service string) netip.Addr {
	t.Helper()
	return netip.MustParseAddr(kubectl(t, "-n", namespace, "get", "service", service, "-o", "jsonpath={.spec.clusterIP}"))
}

func nodePort(t *testing.T, namespace, service string) (port int) {
	t.Helper()
	if _, err := fmt.Sscan(kubectl(t, "-n", namespace, "get", "service", service, "-o", "jsonpath={.spec.ports[0].nodePort}"), &port); err != nil {
		t.Fatal(err)
	}
	return port
}

// kubeProxy runs kube-proxy on a node until the function that it returns is called, which also removes its rules.
func kubeProxy(t *testing.T, mode, node string) (stop func()) {
	t.Helper()
	program := filepath.Join(filepath.Dir(cluster.EgretPath()), "k8s-"+lab.KubeVersion, "kube-proxy")
	ns := "egret-" + cluster.Name() + "-" + node
	log, err := os.Create(filepath.Join(t.TempDir(), node+".log"))
	if err != nil {
		t.Fatal(err)
	}
	run := func(more ...string) *exec.Cmd {
		c := exec.Command("ip", append([]string{"netns", "exec", ns, program, "--kubeconfig", filepath.Join(filepath.Dir(cluster.Kubeconfig()), "kubeconfig.control"),
			"--proxy-mode", mode, "--hostname-override", node, "--cluster-cidr", "10.244.0.0/16,fd44::/16",
			"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0"}, more...)...)
		c.Stdout, c.Stderr = log, log
		return c
	}
	c := run()
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	running := true
	stop = func() {
		if !running {
			return
		}
		running = false
		_ = c.Process.Kill() // it is ours, and not waited for
		_ = c.Wait()         // killed
		if err := run("--cleanup").Run(); err != nil {
			t.Errorf("removing what kube-proxy made on %s: %v", node, err)
		}
	}
	t.Cleanup(func() {
		stop()
		if b, err := os.ReadFile(log.Name()); t.Failed() && err == nil {
			t.Logf("kube-proxy of %s:\n%s", node, b)
		}
	})
	return stop
}
