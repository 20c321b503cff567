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
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/egress"
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
	// late is for how long the pod may still be served after the verdict.
	late time.Duration
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

// execOutside runs a command on the host outside.
func execOutside(ctx context.Context, args ...string) error {
	out, err := cluster.Exec(ctx, "outside", "", args...)
	if err != nil {
		err = fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return err
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

// deliberate is a fault in a lab, and what the trace of the pod says of it.
type deliberate struct {
	name string
	// fault makes it and returns what undoes it, which may be called twice.
	fault func(t *testing.T) (mend func() error)
	// ask changes the question; nil: it is that of the pod, for the outside host.
	ask    func(*tracer)
	status int
	says   string // in the verdict
	lost   bool   // nothing of the pod gets out meanwhile
}

// commands is a fault that commands on a node make and undo, one a line.
func commands(node, fault, mend string) func(*testing.T) func() error {
	return func(t *testing.T) func() error {
		t.Helper()
		on(t, node, fault)
		mended := false
		return func() error {
			if mended {
				return nil
			}
			mended = true
			return tryOn(node, mend)
		}
	}
}

// all is several faults that come together.
func all(faults ...func(*testing.T) func() error) func(*testing.T) func() error {
	return func(t *testing.T) func() error {
		t.Helper()
		var mends []func() error
		for _, f := range faults {
			mends = append(mends, f(t))
		}
		return func() (err error) {
			for _, mend := range slices.Backward(mends) {
				err = errors.Join(err, mend())
			}
			return err
		}
	}
}

// component is a fault of a part of the lab.
func component(fault, mend func() error) func(*testing.T) func() error {
	return func(t *testing.T) func() error {
		t.Helper()
		if err := fault(); err != nil {
			t.Fatal(err)
		}
		mended := false
		return func() error {
			if mended {
				return nil
			}
			mended = true
			return mend()
		}
	}
}

// deletes is a program that deletes a policy rule of a node whenever it comes back.
func deletes(node string, priority int) func(*testing.T) func() error {
	return func(*testing.T) func() error {
		ctx, stop := context.WithCancel(context.Background())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			loop := fmt.Sprintf("while :; do ip rule del pref %d || sleep 0.005; done 2>&-", priority)
			_, _ = cluster.Exec(ctx, "node", node, "sh", "-c", loop) // it is killed
		}()
		return func() error { stop(); <-ended; return nil }
	}
}

// TestTraceNamesEachFault makes one fault after the other on the way of a pod, in the records, in the processes and in
// the kernels, has it named by the trace, and undoes it.
func TestTraceNamesEachFault(t *testing.T) {
	n := newNamespace(t)
	n.pool("older", "10.10.0.92", "10.10.0.92")
	n.egress("older", "older", "none")
	time.Sleep(time.Second) // Kubernetes tells ages by the second, and names decide between equal ones
	ip, gateway, pod := n.remote("faults", "10.10.0.93")
	home := otherNode(gateway)
	third := otherNode(gateway, home)
	other := n.pod("other", home, "web") // which the sniffers do not know as one of the egress

	const taken = "10.10.0.57" // by the outside host, before the egress is there
	if err := execOutside(t.Context(), "ip", "addr", "add", taken+"/24", "dev", "eth0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := execOutside(context.Background(), "ip", "addr", "del", taken+"/24", "dev", "eth0"); err != nil {
			t.Error(err)
		}
	})
	n.pool("taken", taken, taken)
	n.egress("taken", "taken", "taken")

	etcd, err := store.Dial(t.Context(), store.Config{Endpoints: cluster.EtcdEndpoints()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { etcd.Close() })
	base := tracer{t: t, etcd: etcd, pod: pod, to: lab.OutsideIP}
	leaves := fmt.Sprintf("gets through, as %s by gateway %s.", ip, gateway)
	well := "As the kernels of its nodes tell it " + leaves
	base.names(0, well)
	homeIP, gatewayIP := nodeIP(t, home), nodeIP(t, gateway)
	olderIP, _ := held(t, "older")

	background := context.WithoutCancel(t.Context()) // faults are undone when the test has failed, too
	run := func(args ...string) func() error {
		return func() error {
			out, err := cluster.Kubectl(background, args...)
			if err != nil {
				err = fmt.Errorf("kubectl %s: %w\n%s", strings.Join(args, " "), err, out)
			}
			return err
		}
	}
	by := func(args ...string) func() error {
		return func() error {
			out, err := cluster.Egret(background, args...)
			if err != nil {
				err = fmt.Errorf("egret %s: %w\n%s", strings.Join(args, " "), err, out)
			}
			return err
		}
	}
	// labelled is a label app of the other pod, in place of web.
	labelled := func(app string) func(*testing.T) func() error {
		label := func(app string) func() error {
			return run("label", "--overwrite", "-n", n.name, "pod/other", "app="+app)
		}
		return component(label(app), label("web"))
	}
	// back brings the IP back to the gateway, in case another node took it.
	back := func() (err error) {
		for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			if _, node := lookUp(t, "faults"); node == gateway {
				return nil
			}
			if err = by("move", ip.String(), "--to", gateway)(); err == nil {
				return nil
			}
		}
		return err
	}
	ofOther := func(r *tracer) { r.pod = other }
	tcp := func(r *tracer) { r.live = &operator.Live{Protocol: 6, Port: lab.EchoPort, Page: agent.LivePage} }
	silence := func(node string, peer netip.Addr, also string) func(*testing.T) func() error {
		return commands(node, fmt.Sprintf("nft 'add table arp cut; add chain arp cut in { type filter hook input priority 0; }; add rule arp cut in arp saddr ip %s drop; "+
			"add chain arp cut out { type filter hook output priority 0; }; add rule arp cut out arp daddr ip %[1]s drop'%s", peer, also), "nft delete table arp cut")
	}
	firewall := func(node, hook, rule string) func(*testing.T) func() error {
		return commands(node, fmt.Sprintf("nft 'add table inet fw; add chain inet fw c { type filter hook %s priority 0; }; add rule inet fw c %s'", hook, rule), "nft delete table inet fw")
	}
	drops := func(node, what, where string) string { return node + " drops it, " + what + ": " + where }
	to, from := "ip daddr "+lab.OutsideIP.String()+" counter drop", "ip saddr "+lab.OutsideIP.String()+" counter drop"
	const overlay = "udp dport 8479 drop"

	faults := []deliberate{
		{"a wrong label", labelled("db"), ofOther, 0, "no egress selects it", false},
		{"an older egress", labelled("none"), ofOther, 0, "as " + olderIP.String() + " by ", false},
		{"an address that another host has", labelled("taken"), ofOther, 2, "no node holds " + taken + ": another host uses it, ", false},
		{"an exception: a Service", nil, func(r *tracer) { r.to = unassigned[0] }, 0, "of ServiceCIDR ", false},
		{"an exception: another node", nil, func(r *tracer) { r.to = gatewayIP }, 0, "an address of node " + gateway, false},
		{"an exception: a flag of the agent", component(
			func() error {
				return cluster.Upgrade(background, home, cluster.EgretPath(), "--egress.exceptCIDRs="+exceptCIDRs[0])
			},
			func() error {
				return errors.Join(cluster.Stop(background, "agent", home), cluster.Start(background, "agent", home))
			}), func(r *tracer) { r.to = excepted[0] }, 0, fmt.Sprintf("%s is in %s, to which no egress applies on %s", excepted[0], exceptCIDRs[0], home), false},
		{"a pool that selects no node", component(
			run("patch", "externalippool", "faults", "--type", "merge", "-p", `{"spec":{"nodeSelector":{"matchLabels":{"no":"node"}}}}`),
			run("patch", "externalippool", "faults", "--type", "json", "-p", `[{"op":"replace","path":"/spec/nodeSelector","value":{}}]`)),
			nil, 2, "pool faults selects no node", true},
		{"a gateway without a permit", all(component(func() error { return nil }, back),
			component(by("cordon", home), by("uncordon", home)), component(by("cordon", third), by("uncordon", third)),
			component(func() error { return cluster.Cut(background, gateway, "etcd") }, func() error { return cluster.Heal(background, gateway, "etcd") })),
			// etcd's last yes may come after a permit ended, as on a busy machine, and begin another one
			func(r *tracer) { r.late = 500 * time.Millisecond }, 2, gateway + " has no permit for " + ip.String(), true},
		{"a route of another program in place of Egret's", commands(home, "ip route replace unreachable default table 15190", "ip route del unreachable default table 15190"),
			nil, 2, fmt.Sprintf("%s sends what is for %s nowhere (no route to host) in place of link egret.vx", home, gateway), true},
		{"a rule of another program before Egret's", commands(home, "ip route add default dev eth0 table 77\nip rule add pref 500 fwmark 0x3ffe/0x3fff table 77",
			"ip rule del pref 500\nip route del default table 77"), nil, 2, "out by link eth0 in place of egret.vx", true},
		{"a deleted rule, as often as the agent adds it", deletes(home, egress.ExitPriority), nil, 2, "out by link eth0 in place of egret.vx", false},
		{"a smaller MTU of the gateway's link", commands(gateway, "ip link set eth0 mtu 1400", "ip link set eth0 mtu 1500"),
			nil, 3, fmt.Sprintf("the MTU is too small: %s puts packets of up to 1450 bytes into the overlay, which adds 50, and link eth0 of %s takes 1400", home, gateway), false},
		// What the node knew of the gateway it would know for half a minute more, and it would learn from what the
		// gateway asks others.
		{"a gateway that answers no ARP of the pod's node", all(silence(gateway, homeIP, ""), silence(home, gatewayIP, fmt.Sprintf("\nip neigh flush to %s", gatewayIP))),
			nil, 2, fmt.Sprintf("%s, the underlay address of %s, does not answer ARP on link eth0 of %s", gatewayIP, gateway, home), true},
		{"a firewall that drops what the pod's node forwards", firewall(home, "forward", to), tcp, 2, drops(home, "from the pod", "rule "), true},
		{"a firewall that drops what the gateway forwards", firewall(gateway, "forward", to), tcp, 2, drops(gateway, "out of the overlay", "rule "), true},
		{"a firewall that drops answers at the gateway", firewall(gateway, "forward", from), tcp, 2, drops(gateway, "the answer", "rule "), true},
		{"a firewall that drops what goes into the overlay", firewall(home, "output", overlay), tcp, 2, drops(home, "into the overlay", "rule "), true},
		{"a firewall that drops what comes from the overlay", firewall(gateway, "input", overlay), tcp, 2, drops(gateway, "from the overlay", "rule "), true},
		{"a firewall's policy", commands(gateway, "nft 'add table ip fw; add chain ip fw c { type filter hook forward priority 0; policy drop; }'", "nft delete table ip fw"),
			tcp, 2, drops(gateway, "out of the overlay", "the policy of chain c of table ip fw"), true},
		{"an agent that stands still", component(func() error { return cluster.Freeze(background, home) }, func() error { return cluster.Thaw(background, home) }),
			nil, 3, "the agent of " + home + " is down: its kernel has what it was last told", false},
		{"a label that was taken away while the agent stands still", all(
			component(func() error { return cluster.Freeze(background, home) }, func() error { return cluster.Thaw(background, home) }), labelled("db")),
			ofOther, 3, "appliedTo asks for, but: the agent of " + home + " is down: its kernel has what it was last told", false},
		{"an agent that was stopped", component(func() error { return cluster.Stop(background, "agent", home) }, func() error { return cluster.Start(background, "agent", home) }),
			nil, 3, "was told to stop", false},
		{"an agent that was killed", component(func() error { return cluster.Kill(background, "agent", home) }, func() error { return cluster.Start(background, "agent", home) }),
			nil, 3, "the agent of " + home + " is down", false},
	}
	for _, tt := range faults {
		t.Run(tt.name, func(t *testing.T) {
			r := base
			if r.t = t; tt.ask != nil {
				tt.ask(&r)
			}
			if tt.fault == nil {
				r.names(tt.status, tt.says)
				return
			}
			mend := tt.fault(t)
			defer func() {
				if err := mend(); err != nil {
					t.Error(err)
				}
			}()
			if r.names(tt.status, tt.says); tt.lost {
				time.Sleep(r.late)
				unseen(t, pod)
			}
			if err := mend(); err != nil {
				t.Fatal(err)
			}
			switch {
			case tt.ask == nil || r.late > 0:
				r.names(0, well)
			case r.live == nil: // else packets tell as much, and sooner
				r.names(0, leaves)
			}
			leavesAs(t, pod, ip)
		})
	}

	t.Run("tables that only their agent can write to", func(t *testing.T) {
		if out, err := cluster.Exec(t.Context(), "node", home, "nft", "delete", "table", "inet", "egret"); err == nil {
			t.Skipf("the kernel has no tables of an owner: %s", out) // there they are back within a second
		}
		r := base
		r.t = t
		r.names(0, well)
	})

	t.Run("ports that are used up", func(t *testing.T) {
		r := base
		r.t = t
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
	if err := execOutside(t.Context(), "ip", "addr", "add", "10.30.0.1/24", "dev", "eth0"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := execOutside(context.Background(), "ip", "addr", "del", "10.30.0.1/24", "dev", "eth0"); err != nil {
			t.Error(err)
		}
	}()
	r.names(0, "gets through, as 10.30.0.11 by gateway "+gateway)
}

// TestTraceSendsAPacketInThePodsNameAndLeavesNothing: by the kernel's own trace.
func TestTraceSendsAPacketInThePodsNameAndLeavesNothing(t *testing.T) {
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
