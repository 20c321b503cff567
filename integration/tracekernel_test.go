package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/store"
)

// bySockets asks the agent of each node as root does that is on it, by its socket.
var bySockets = operator.AskBy(func(_ context.Context, node string, _ []netip.Addr) (string, *http.Client) {
	dial := func(ctx context.Context, _, _ string) (c net.Conn, err error) {
		err = cluster.In("node", node, func() error { c, err = (&net.Dialer{}).DialContext(ctx, "unix", agent.Socket); return err })
		return c, err
	}
	return "http://agent", &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: dial}}
})

// tracer traces a pod by records and kernels.
type tracer struct {
	t    *testing.T
	etcd *store.Client
	pod  string
	to   netip.Addr
	live *operator.Live
}

// names waits until the verdict of a trace is of an exit status, and says something.
func (r *tracer) names(status int, says string) {
	r.t.Helper()
	eventually(r.t, 30*time.Second, func() error {
		var out bytes.Buffer
		var v operator.Verdict
		err := operator.Trace(r.t.Context(), r.etcd, operator.Question{Pod: r.pod, To: r.to, Live: r.live}, bySockets, agent.KernelPage, "", &out)
		if err != nil && !errors.As(err, &v) {
			return err
		}
		if lines := strings.Split(strings.TrimSpace(out.String()), "\n"); v.Status != status || !strings.Contains(lines[len(lines)-1], says) {
			return fmt.Errorf("status %d, want %d and %q in the verdict:\n%s", v.Status, status, says, out.String())
		}
		return nil
	})
}

// on runs commands on a node, one a line.
func on(t *testing.T, node, lines string) {
	t.Helper()
	if err := tryOn(node, lines); err != nil {
		t.Fatal(err)
	}
}

func tryOn(node, lines string) error {
	for line := range strings.Lines(lines) {
		if out, err := cluster.Exec(context.Background(), "node", node, "sh", "-c", line); err != nil {
			return fmt.Errorf("%s: %s: %w\n%s", node, strings.TrimSpace(line), err, out)
		}
	}
	return nil
}

// unseen checks that nothing of the pod gets out.
func unseen(t *testing.T, pod string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if seen, err := cluster.Source(ctx, pod); err == nil {
		t.Errorf("the pod was seen outside as %s", seen)
	}
}

// TestTraceNamesWhatIsWrongInAKernel makes one fault after the other in the kernels on a pod's way, each of which the
// trace names, and undoes it.
func TestTraceNamesWhatIsWrongInAKernel(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("kernels", "10.10.0.52")
	home := otherNode(gateway)
	etcd, err := store.Dial(t.Context(), store.Config{Endpoints: cluster.EtcdEndpoints()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { etcd.Close() })
	r := &tracer{t: t, etcd: etcd, pod: pod, to: lab.OutsideIP}
	well := fmt.Sprintf("As the kernels of its nodes tell it gets through, as %s by gateway %s.", ip, gateway)
	r.names(0, well)
	homeIP, gatewayIP := nodeIP(t, home), nodeIP(t, gateway)

	for _, tt := range []struct {
		name, node  string
		fault, mend string // commands on the node, one a line
		status      int
		says        string
		lost        bool // nothing of the pod gets out meanwhile
	}{
		{"a route of another program in place of Egret's", home, "ip route replace unreachable default table 15190", "ip route del unreachable default table 15190",
			2, fmt.Sprintf("%s sends what is for %s nowhere (no route to host) in place of link egret.vx", home, gateway), true},
		{"a rule of another program before Egret's", home, "ip route add default dev eth0 table 77\nip rule add pref 500 fwmark 0x3ffe/0x3fff table 77",
			"ip rule del pref 500\nip route del default table 77", 2, "out by link eth0 in place of egret.vx", true},
		{"a smaller MTU of the gateway's link", gateway, "ip link set eth0 mtu 1400", "ip link set eth0 mtu 1500",
			3, fmt.Sprintf("the MTU is too small: %s puts packets of up to 1450 bytes into the overlay, which adds 50, and link eth0 of %s takes 1400", home, gateway), false},
		{"a gateway that answers no ARP of the pod's node", gateway,
			fmt.Sprintf("nft 'add table arp cut; add chain arp cut in { type filter hook input priority 0; }; add rule arp cut in arp saddr ip %s drop; "+
				"add chain arp cut out { type filter hook output priority 0; }; add rule arp cut out arp daddr ip %[1]s drop'", homeIP),
			"nft delete table arp cut", 2, fmt.Sprintf("%s, the underlay address of %s, does not answer ARP on link eth0 of %s", gatewayIP, gateway, home), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &tracer{t: t, etcd: etcd, pod: pod, to: r.to}
			on(t, tt.node, tt.fault)
			mended := false
			defer func() {
				if err := tryOn(tt.node, tt.mend); err != nil && !mended {
					t.Error(err)
				}
			}()
			if strings.Contains(tt.fault, "arp") {
				// What the node knew of the gateway it would know for half a minute more, and it would learn from what
				// the gateway asks others.
				on(t, home, fmt.Sprintf("nft 'add table arp cut; add chain arp cut in { type filter hook input priority 0; }; add rule arp cut in arp saddr ip %s drop'\n"+
					"ip neigh flush to %[1]s", gatewayIP))
				defer func() {
					if err := tryOn(home, "nft delete table arp cut"); err != nil && !mended {
						t.Error(err)
					}
				}()
			}
			if r.names(tt.status, tt.says); tt.lost {
				unseen(t, pod)
			}
			on(t, tt.node, tt.mend)
			if strings.Contains(tt.fault, "arp") {
				on(t, home, "nft delete table arp cut")
			}
			mended = true
			r.names(0, well)
			leavesAs(t, pod, ip)
		})
	}

	t.Run("tables that only their agent can write to", func(t *testing.T) {
		if out, err := cluster.Exec(t.Context(), "node", home, "nft", "delete", "table", "inet", "egret"); err == nil {
			t.Skipf("the kernel has no tables of an owner: %s", out) // there they are back within a second
		}
		(&tracer{t: t, etcd: etcd, pod: pod, to: r.to}).names(0, well)
	})

	t.Run("an agent that stands still", func(t *testing.T) {
		r := &tracer{t: t, etcd: etcd, pod: pod, to: r.to}
		if err := cluster.Freeze(t.Context(), home); err != nil {
			t.Fatal(err)
		}
		thaw := func() error { return cluster.Thaw(context.Background(), home) }
		defer thaw() // again, after it went on: nothing
		r.names(3, "the agent of "+home+" is down: its kernel has what it was last told")
		leavesAs(t, pod, ip) // its kernel serves on
		if err := thaw(); err != nil {
			t.Fatal(err)
		}
		r.names(0, well)
	})

	t.Run("ports that are used up", func(t *testing.T) {
		r := &tracer{t: t, etcd: etcd, pod: pod, to: r.to}
		if err := cluster.Stop(t.Context(), "crdsync", ""); err != nil { // who would give the node a larger block
			t.Fatal(err)
		}
		defer func() {
			if err := cluster.Start(context.Background(), "crdsync", ""); err != nil {
				t.Error(err)
			}
		}()
		send := func() error {
			// Some of those that come when few ports are left do not find one.
			for port := 10000; port < 13000; port++ {
				c, err := net.DialUDP("udp4", &net.UDPAddr{Port: port}, &net.UDPAddr{IP: lab.OutsideIP.AsSlice(), Port: 7999})
				if err != nil {
					return err
				}
				_, err = c.Write([]byte("x"))
				c.Close()
				if err != nil && !strings.Contains(err.Error(), "refused") && !strings.Contains(err.Error(), "not permitted") {
					return fmt.Errorf("port %d: %w", port, err)
				}
			}
			return nil
		}
		if err := cluster.In("pod", pod, send); err != nil {
			t.Fatal(err)
		}
		r.names(3, "all 1024 ports that "+home+" has of "+ip.String()+" are in use to one destination")
	})
}

// TestTraceNamesTheGatewayOfASubnetThatIsSilent: as where its VLAN ends before the node. Then the gateway is there.
func TestTraceNamesTheGatewayOfASubnetThatIsSilent(t *testing.T) {
	n := newNamespace(t)
	n.apply(map[string]any{"kind": "ExternalIPPool", "metadata": n.meta("silent"), "spec": map[string]any{
		"ipRanges": []any{map[string]any{"start": "10.30.0.11", "end": "10.30.0.11"}}, "nodeSelector": map[string]any{},
		"subnetInfo": map[string]any{"gateway": "10.30.0.1", "prefixLength": 24}}})
	n.egress("silent", "silent", "web")
	_, gateway := held(t, "silent")
	pod := n.pod("web", otherNode(gateway), "web")
	etcd, err := store.Dial(t.Context(), store.Config{Endpoints: cluster.EtcdEndpoints()})
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()
	r := &tracer{t: t, etcd: etcd, pod: pod}
	silent := "10.30.0.1, the gateway of 10.30.0.0/24, does not answer ARP on link eth0 of " + gateway
	r.names(3, silent)
	r.to = netip.MustParseAddr("10.30.0.1")
	r.names(3, silent)
	unseen(t, pod) // lab.OutsideIP is behind that gateway, too
	r.names(2, silent+", whose neighbour entry is ")
	if out, err := cluster.Exec(t.Context(), "outside", "", "ip", "addr", "add", "10.30.0.1/24", "dev", "eth0"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	defer func() {
		if out, err := cluster.Exec(context.Background(), "outside", "", "ip", "addr", "del", "10.30.0.1/24", "dev", "eth0"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}()
	r.names(0, "gets through, as 10.30.0.11 by gateway "+gateway)
}

// TestTraceFollowsAPacketAndNamesTheFirewallThatDropsIt: by the kernel's own trace of a packet in the pod's name.
func TestTraceFollowsAPacketAndNamesTheFirewallThatDropsIt(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("follows", "10.10.0.53")
	home := otherNode(gateway)
	etcd, err := store.Dial(t.Context(), store.Config{Endpoints: cluster.EtcdEndpoints()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { etcd.Close() })
	r := &tracer{t: t, etcd: etcd, pod: pod, to: lab.OutsideIP, live: &operator.Live{Protocol: 6, Page: agent.LivePage}}
	r.names(3, "did not come to "+home+" while it was waited for") // to any port: the pod would have to send one
	r.live = &operator.Live{Protocol: 6, Port: lab.EchoPort, Page: agent.LivePage}
	untraced := func(t *testing.T) {
		t.Helper()
		for _, node := range nodes() {
			eventually(t, 5*time.Second, func() error { // whom nobody waits for any more ends a moment later
				out, err := cluster.Exec(t.Context(), "node", node, "nft", "list", "tables")
				if err == nil && strings.Contains(string(out), "egret-trace") {
					err = fmt.Errorf("%s: tables\n%s", node, out)
				}
				return err
			})
		}
	}

	well := fmt.Sprintf("gets through, as %s by gateway %s.", ip, gateway)
	drops := func(node, what, chain string) string { return node + " drops it, " + what + ": " + chain }
	fw := func(hook, rule string) (fault, mend string) {
		return fmt.Sprintf("nft 'add table inet fw; add chain inet fw c { type filter hook %s priority 0; }; add rule inet fw c %s'", hook, rule), "nft delete table inet fw"
	}
	forward, mend := fw("forward", "ip daddr "+lab.OutsideIP.String()+" counter drop")
	answers, _ := fw("forward", "ip saddr "+lab.OutsideIP.String()+" counter drop")
	output, _ := fw("output", "udp dport 8479 drop")
	input, _ := fw("input", "udp dport 8479 drop")
	for _, tt := range []struct{ name, node, fault, mend, says string }{
		{"what the pod's node forwards", home, forward, mend, drops(home, "from the pod", "rule ")},
		{"what the gateway forwards", gateway, forward, mend, drops(gateway, "out of the overlay", "rule ")},
		{"answers at the gateway", gateway, answers, mend, drops(gateway, "the answer", "rule ")},
		{"what goes into the overlay", home, output, mend, drops(home, "into the overlay", "rule ")},
		{"what comes from the overlay", gateway, input, mend, drops(gateway, "from the overlay", "rule ")},
		{"by policy", gateway, "nft 'add table ip fw; add chain ip fw c { type filter hook forward priority 0; policy drop; }'", "nft delete table ip fw",
			drops(gateway, "out of the overlay", "the policy of chain c of table ip fw")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &tracer{t: t, etcd: etcd, pod: pod, to: r.to, live: r.live}
			on(t, tt.node, tt.fault)
			defer func() {
				if err := tryOn(tt.node, tt.mend); err != nil {
					t.Error(err)
				}
			}()
			r.names(2, tt.says)
			untraced(t)
		})
	}
	r.names(0, well)
	leavesAs(t, pod, ip) // as what was in its name
	for name, live := range map[string]operator.Live{"a datagram": {Protocol: 17, Port: 9}, "an echo": {Protocol: 1}} {
		t.Run(name, func(t *testing.T) {
			live.Page = agent.LivePage
			(&tracer{t: t, etcd: etcd, pod: pod, to: r.to, live: &live}).names(0, well)
		})
	}

	t.Run("of an agent that dies", func(t *testing.T) {
		traced := make(chan error, 1)
		go func() {
			traced <- operator.Trace(t.Context(), etcd, operator.Question{Pod: pod, To: r.to, Live: r.live}, bySockets, agent.KernelPage, "", io.Discard)
		}()
		eventually(t, 10*time.Second, func() error {
			out, err := cluster.Exec(t.Context(), "node", home, "nft", "list", "tables")
			if err == nil && !strings.Contains(string(out), "egret-trace") {
				err = errors.New("no trace has begun")
			}
			return err
		})
		if err := cluster.Kill(t.Context(), "agent", home); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := cluster.Start(context.Background(), "agent", home); err != nil {
				t.Error(err)
			}
		}()
		if err := <-traced; err == nil {
			t.Error("the trace says that all is well")
		}
		untraced(t)
	})
}
