// Package subnets tests egress IPs outside the nodes' own subnet, with and without VLAN, by packets: two agents and a
// real etcd, in network namespaces. It needs no API server, so that it also runs in a virtual machine, whose kernel has
// VLANs.
package subnets

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/agent"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/need"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/store"
)

// An agent is this program itself, in the namespace of its node.
const (
	nodeVariable = "EGRET_SUBNETS_NODE" // node, address and etcd's endpoint, separated by spaces
	// a virtual machine without hardware support is slow; what it guards is tested elsewhere
	permit = 3 * time.Second
)

func TestMain(m *testing.M) {
	if v := os.Getenv(nodeVariable); v != "" {
		if err := runAgent(strings.Fields(v)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func runAgent(args []string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	client, err := store.Dial(ctx, store.Config{Endpoints: args[2:]})
	if err != nil {
		return err
	}
	defer client.Close()
	return agent.Run(ctx, agent.Config{
		Node: args[0], NodeIP: netip.MustParseAddr(args[1]), Store: client, Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), Version: "test",
		Timing: agent.Timing{LeaseTTL: permit, Permit: permit, ClaimDelay: time.Second, Linger: time.Second},
	})
}

// world is two nodes, node-1 that may hold egress IPs and node-2, each with a pod; and on their LAN two routers to the
// same destinations, and a host. Whoever is reached tells its name.
type world struct {
	*testing.T
	id     int
	client *store.Client
	stop   map[string]func() // the agents, by node
}

// The destinations behind both routers.
var outside = map[bool]string{true: "203.0.113.1", false: "2001:db8:1::1"}

func newWorld(t *testing.T) *world {
	need.Root(t)
	need.VXLANGBP(t)
	w := &world{T: t, id: os.Getpid(), stop: map[string]func(){}}
	server := etcdtest.New(t)
	client, err := store.Dial(t.Context(), store.Config{Endpoints: []string{server.Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	w.client = client

	w.namespace("lan")
	w.ip("lan", "link add br0 type bridge", "link set br0 up")
	for name, addrs := range map[string]string{
		"node-1": "10.10.0.101/24 fd10::101/64", "node-2": "10.10.0.102/24 fd10::102/64",
		"router-1": "10.10.0.1/24 fd10::1/64 10.20.0.1/24 fd20::1/64", "router-2": "10.20.0.2/24 fd20::2/64",
		"host": "10.20.0.77/24 fd20::77/64",
	} {
		w.namespace(name)
		w.ip("lan", "link add port-"+name+" type veth peer name eth0 netns "+w.netns(name), "link set port-"+name+" master br0 up")
		w.addresses(name, "eth0", addrs)
	}
	for _, r := range []string{"router-1", "router-2"} {
		w.addresses(r, "lo", "203.0.113.1/32 2001:db8:1::1/128")
	}
	for i, node := range []string{"node-1", "node-2"} {
		pod := fmt.Sprintf("pod-%d", i+1)
		w.namespace(pod)
		w.ip(node, "route add default via 10.10.0.1", "-6 route add default via fd10::1")
		w.sysctl(node, "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.eth0.rp_filter=2")
		w.ip(node, "link add pod0 type veth peer name eth0 netns "+w.netns(pod))
		w.addresses(node, "pod0", fmt.Sprintf("10.244.%d.1/24 fd44:%d::1/64", i+1, i+1))
		w.addresses(pod, "eth0", fmt.Sprintf("10.244.%d.2/24 fd44:%d::2/64", i+1, i+1))
		w.ip(pod, fmt.Sprintf("route add default via 10.244.%d.1", i+1), fmt.Sprintf("-6 route add default via fd44:%d::1", i+1))
		w.node(i+1, i == 0)
	}
	for _, name := range []string{"router-1", "router-2"} {
		w.tells(name, outside[true], outside[false])
	}
	w.tells("host", "10.20.0.77", "fd20::77")
	endpoint := w.relay(server.Endpoint())
	for i, node := range []string{"node-1", "node-2"} {
		w.agent(node, fmt.Sprintf("10.10.0.10%d", i+1), endpoint)
	}
	return w
}

func (w *world) netns(name string) string { return fmt.Sprintf("egret-subnets-%d-%s", w.id, name) }

func (w *world) namespace(name string) {
	w.Helper()
	w.run("ip", "netns", "add", w.netns(name))
	w.Cleanup(func() { _ = exec.Command("ip", "netns", "del", w.netns(name)).Run() })
	w.sysctl(name, "net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.all.accept_dad=0")
	w.ip(name, "link set lo up")
}

func (w *world) run(args ...string) string {
	w.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		w.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (w *world) in(name string, args ...string) string {
	w.Helper()
	return w.run(append([]string{"ip", "netns", "exec", w.netns(name)}, args...)...)
}

func (w *world) ip(name string, lines ...string) {
	w.Helper()
	for _, line := range lines {
		w.run(append([]string{"ip", "-n", w.netns(name)}, strings.Fields(line)...)...)
	}
}

func (w *world) addresses(name, link, addrs string) {
	w.Helper()
	w.ip(name, "link set "+link+" up")
	for _, a := range strings.Fields(addrs) {
		command := "addr add " + a + " dev " + link
		if strings.Contains(a, ":") {
			// as one that has been there for long: until the kernel knows that an address is nobody else's it does not
			// answer for it
			command += " nodad"
		}
		w.ip(name, command)
	}
}

func (w *world) sysctl(name string, settings ...string) {
	w.Helper()
	for _, s := range settings {
		key, value, _ := strings.Cut(s, "=")
		w.in(name, "sh", "-c", fmt.Sprintf("echo %s >/proc/sys/%s", value, strings.ReplaceAll(key, ".", "/")))
	}
}

// tells makes whoever sends a datagram to addresses of a host know its name, and by which source it came.
func (w *world) tells(name string, addrs ...string) {
	w.Helper()
	for _, addr := range addrs {
		var conn net.PacketConn
		err := netns.Do(w.netns(name), func() (err error) {
			conn, err = net.ListenPacket("udp", net.JoinHostPort(addr, "7"))
			return err
		})
		if err != nil {
			w.Fatal(err)
		}
		w.Cleanup(func() { conn.Close() })
		go func() {
			buf := make([]byte, 100)
			for {
				_, from, err := conn.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = conn.WriteTo([]byte(name+" "+from.(*net.UDPAddr).IP.String()), from)
			}
		}()
	}
}

// ask returns who answers a pod that sends to an address, and by which source it came to it.
func (w *world) ask(pod, to string) (string, error) {
	var conn net.Conn
	err := netns.Do(w.netns(pod), func() (err error) {
		conn, err = net.Dial("udp", net.JoinHostPort(to, "7"))
		return err
	})
	if err != nil {
		return "", err
	}
	defer conn.Close()
	buf := make([]byte, 100)
	_, _ = conn.Write([]byte("who?"))
	_ = conn.SetReadDeadline(time.Now().Add(time.Second))
	n, err := conn.Read(buf)
	return string(buf[:n]), err
}

// wantAnswer waits until a pod's packets arrive where they are to arrive, with the source that they are to have.
func (w *world) wantAnswer(pod, to, want string) {
	w.Helper()
	w.eventually(func() error {
		if got, err := w.ask(pod, to); err != nil || got != want {
			return fmt.Errorf("%s to %s: %q, %v; want %q", pod, to, got, err, want)
		}
		return nil
	})
}

func (w *world) eventually(f func() error) {
	w.Helper()
	var err error
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	w.Fatal(err)
}

// relay makes etcd reachable from all namespaces, by a file.
func (w *world) relay(endpoint string) string {
	w.Helper()
	path := filepath.Join(w.TempDir(), "etcd")
	l, err := net.Listen("unix", path)
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { l.Close() })
	go func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("tcp", endpoint)
			if err != nil {
				a.Close()
				continue
			}
			for from, to := range map[net.Conn]net.Conn{a: b, b: a} {
				go func() {
					_, _ = io.Copy(to, from)
					to.Close()
				}()
			}
		}
	}()
	return "unix://" + path
}

func (w *world) agent(node, address, endpoint string) {
	w.Helper()
	log, err := os.Create(filepath.Join(w.TempDir(), node))
	if err != nil {
		w.Fatal(err)
	}
	cmd := exec.Command("ip", "netns", "exec", w.netns(node), "/proc/self/exe")
	cmd.Args[len(cmd.Args)-1], _ = os.Executable()
	cmd.Env = append(os.Environ(), nodeVariable+"="+node+" "+address+" "+endpoint)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		w.Fatal(err)
	}
	w.stop[node] = sync.OnceFunc(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			w.Errorf("the agent of %s: %v", node, err)
		}
	})
	w.Cleanup(func() {
		w.stop[node]()
		if out, _ := os.ReadFile(log.Name()); w.Failed() {
			w.Logf("%s:\n%s", node, out)
		}
	})
}

func (w *world) put(key string, record any) {
	w.Helper()
	value, err := json.Marshal(record)
	if err == nil {
		_, err = w.client.Etcd().Put(w.Context(), w.client.Prefix()+key, string(value))
	}
	if err != nil {
		w.Fatal(err)
	}
}

// node puts the record of a node, which may hold egress IPs or not.
func (w *world) node(n int, gateway bool) {
	w.Helper()
	node := fmt.Sprintf("node-%d", n)
	w.put("nodes/"+node, egress.Node{
		Name: node, Index: n, Labels: map[string]string{"gateway": fmt.Sprint(gateway)},
		Addresses: []netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.10.0.10%d", n))},
		PodCIDRs:  []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", n)), netip.MustParsePrefix(fmt.Sprintf("fd44:%d::/64", n))},
	})
}

// gap returns the longest time in which a pod that sends to an address every 2 ms, for 3 s in all, got no answer. f
// runs meanwhile.
func (w *world) gap(pod, to string, f func()) time.Duration {
	w.Helper()
	var conn net.Conn
	err := netns.Do(w.netns(pod), func() (err error) {
		conn, err = net.Dial("udp", net.JoinHostPort(to, "7"))
		return err
	})
	if err != nil {
		w.Fatal(err)
	}
	defer conn.Close()
	longest := make(chan time.Duration)
	go func() {
		var gap time.Duration
		buf := make([]byte, 100)
		for last := time.Now(); ; {
			_, err := conn.Read(buf)
			gap = max(gap, time.Since(last))
			if errors.Is(err, os.ErrDeadlineExceeded) {
				longest <- gap
				return
			}
			if err == nil {
				last = time.Now()
			}
		}
	}()
	begin := time.Now()
	time.AfterFunc(500*time.Millisecond, f)
	for time.Since(begin) < 3*time.Second {
		_, _ = conn.Write([]byte("?")) // lost where nobody is
		time.Sleep(2 * time.Millisecond)
	}
	if err := conn.SetReadDeadline(time.Now()); err != nil {
		w.Fatal(err)
	}
	return <-longest
}

func (w *world) drop(keys ...string) {
	w.Helper()
	for _, key := range keys {
		if _, err := w.client.Etcd().Delete(w.Context(), w.client.Prefix()+key); err != nil {
			w.Fatal(err)
		}
	}
}

// pool puts a pool for node-1, of a subnet with the gateway, as address/length.
func (w *world) pool(name, gateway string, vlan int) {
	w.Helper()
	p := netip.MustParsePrefix(gateway)
	r := egress.Range{Start: p.Masked().Addr().Next(), End: p.Masked().Addr().Next()}
	for range 200 {
		r.End = r.End.Next()
	}
	w.put("pools/"+name, egress.Pool{
		Name: name, Ranges: []egress.Range{r}, Subnet: &egress.Subnet{Gateway: p.Addr(), PrefixLength: p.Bits(), VLAN: vlan},
		NodeSelector: egress.Selector{MatchLabels: map[string]string{"gateway": "true"}},
	})
}

// egress gives a pod egress IPs, each as "pool address".
func (w *world) egress(name string, pod int, id int, ips ...string) {
	w.Helper()
	p := egress.Policy{Name: name, Created: time.Now(), Generation: 1}
	for i, ip := range ips {
		pool, addr, _ := strings.Cut(ip, " ")
		p.Addresses = append(p.Addresses, egress.Address{IP: netip.MustParseAddr(addr), ID: egress.ID(id + i), Pool: pool})
		w.put("allocations/"+addr, egress.Allocation{IP: netip.MustParseAddr(addr), Pool: pool, ID: egress.ID(id + i), Egresses: []string{name}})
	}
	node := fmt.Sprintf("node-%d", pod)
	m := egress.Members{Egress: name, Node: node, Pods: []egress.Member{{Pod: fmt.Sprintf("default/pod-%d", pod), IPs: []netip.Addr{
		netip.MustParseAddr(fmt.Sprintf("10.244.%d.2", pod)), netip.MustParseAddr(fmt.Sprintf("fd44:%d::2", pod))}}}}
	for _, a := range p.Addresses { // as crdsync does it
		m.Blocks = append(m.Blocks, egress.Block{IP: a.IP, First: uint16(2048 + 1024*pod), Size: 1024, Node: node})
	}
	w.put("egresses/"+name, p)
	w.put("members/by-node/"+node+"/"+name, m)
	w.put("members/by-egress/"+name+"/"+node, m)
}

// An owner whose uplink is down gives its IPs up, as far as it reaches etcd. It is silent then: nobody waits for its
// permit to end.
func TestUplinkWithoutCarrierIsLeftAtOnce(t *testing.T) {
	bound := 300 * time.Millisecond
	if testing.Short() { // in a virtual machine without hardware support; who waits for the permit waits for all of it
		bound = permit * 9 / 10
	}
	var gaps []time.Duration
	for i := range 3 { // a busy machine may be late, and is not each time
		t.Run(fmt.Sprint(i), func(t *testing.T) { gaps = append(gaps, uplinkLeft(t)) })
		if t.Failed() || gaps[len(gaps)-1] <= bound {
			return
		}
	}
	t.Errorf("without an answer for %v, want at most %v", gaps, bound)
}

// uplinkLeft returns for how long there was no answer.
func uplinkLeft(t *testing.T) time.Duration {
	w := newWorld(t)
	w.pool("lan", "10.10.0.1/24", 0)
	w.egress("far", 2, 1, "lan 10.10.0.50")
	w.wantAnswer("pod-2", outside[true], "router-1 10.10.0.50")
	w.node(2, true)
	time.Sleep(time.Second) // for node-2 to know that it may
	gap := w.gap("pod-2", outside[true], func() { w.ip("lan", "link set port-node-1 down") })
	t.Logf("without an answer for %v", gap)
	w.wantAnswer("pod-2", outside[true], "router-1 10.10.0.50")
	return gap
}

// A clock that is set ends no lease, no permit and no wait.
func TestAClockThatIsSetMovesNothing(t *testing.T) {
	need.Clock(t)
	w := newWorld(t)
	w.node(2, true)
	w.pool("lan", "10.10.0.1/24", 0)
	w.egress("far", 2, 1, "lan 10.10.0.50")
	w.wantAnswer("pod-2", outside[true], "router-1 10.10.0.50")
	owner := func() string {
		t.Helper()
		resp, err := w.client.Etcd().Get(t.Context(), w.client.Prefix()+"owners/10.10.0.50")
		if err != nil || len(resp.Kvs) != 1 {
			t.Fatal(resp, err)
		}
		return fmt.Sprintf("%s, revision %d", resp.Kvs[0].Value, resp.Kvs[0].ModRevision)
	}
	before := owner()
	gap := w.gap("pod-2", outside[true], func() {
		for _, by := range []time.Duration{time.Hour, -2 * time.Hour, time.Hour} {
			now := unix.NsecToTimeval(time.Now().Add(by).UnixNano())
			if err := unix.Settimeofday(&now); err != nil {
				t.Errorf("setting the clock: %v", err)
			}
			time.Sleep(700 * time.Millisecond)
		}
	})
	if gap > permit/2 { // the machine is slow: what a clock could end, an hour would
		t.Errorf("without an answer for %v", gap)
	}
	time.Sleep(permit) // for whoever counts from then on
	if after := owner(); after != before {
		t.Errorf("the owner was %s, and is %s", before, after)
	}
	w.wantAnswer("pod-2", outside[true], "router-1 10.10.0.50")
}

func TestPoolInASecondSubnet(t *testing.T) {
	w := newWorld(t)
	w.pool("four", "10.20.0.1/24", 0)
	w.pool("six", "fd20::1/64", 0)
	w.egress("near", 1, 1, "four 10.20.0.10", "six fd20::10")
	w.egress("far", 2, 3, "four 10.20.0.11", "six fd20::11")
	for pod, ips := range map[string]map[bool]string{
		"pod-1": {true: "10.20.0.10", false: "fd20::10"}, "pod-2": {true: "10.20.0.11", false: "fd20::11"},
	} {
		for four, to := range outside {
			w.wantAnswer(pod, to, "router-1 "+ips[four])
		}
		// The routers forward nothing.
		w.wantAnswer(pod, "10.20.0.77", "host "+ips[true])
		w.wantAnswer(pod, "fd20::77", "host "+ips[false])
	}

	// The pools change while they are in use.
	w.pool("four", "10.20.0.2/24", 0)
	w.pool("six", "fd20::2/64", 0)
	for pod, ips := range map[string]map[bool]string{
		"pod-1": {true: "10.20.0.10", false: "fd20::10"}, "pod-2": {true: "10.20.0.11", false: "fd20::11"},
	} {
		for four, to := range outside {
			w.wantAnswer(pod, to, "router-2 "+ips[four])
		}
	}
}

func TestPoolsOnVLANs(t *testing.T) {
	need.VLAN(t)
	w := newWorld(t)
	for i, router := range []string{"router-1", "router-2"} { // with the same addresses, each on a VLAN of its own
		link := fmt.Sprintf("eth0.%d", 10+10*i)
		w.ip(router, fmt.Sprintf("link add link eth0 name %s type vlan id %d", link, 10+10*i))
		w.addresses(router, link, "10.30.0.1/24 fd30::1/64")
		// What comes with a source of the VLAN by another way has no answer.
		w.in(router, "nft", fmt.Sprintf(`table inet t {
			chain in {
				type filter hook input priority 0;
				ip saddr 10.30.0.0/24 iifname != "%s" drop
				ip6 saddr fd30::/64 iifname != "%s" drop
			}
		}`, link, link))
	}
	w.pool("four", "10.30.0.1/24", 10)
	w.pool("six", "fd30::1/64", 10)
	w.pool("other", "10.30.0.1/24", 10) // two pools of one VLAN
	w.egress("near", 1, 1, "four 10.30.0.10", "six fd30::10")
	w.egress("far", 2, 3, "other 10.30.0.11", "six fd30::11")
	all := func(router string) {
		t.Helper()
		for pod, ips := range map[string]map[bool]string{
			"pod-1": {true: "10.30.0.10", false: "fd30::10"}, "pod-2": {true: "10.30.0.11", false: "fd30::11"},
		} {
			for four, to := range outside {
				w.wantAnswer(pod, to, router+" "+ips[four])
			}
		}
	}
	all("router-1")
	link := w.in("node-1", "ip", "-d", "addr", "show", "egret.10")
	for _, want := range []string{"egret.10@eth0", "vlan protocol 802.1Q id 10", "10.30.0.10/24", "10.30.0.11/24", "fd30::10/64", "link/ether " + egress.VLANMAC(netip.MustParseAddr("10.10.0.101"), 10).String()} {
		if !strings.Contains(link, want) {
			t.Errorf("egret.10 is\n%s\nwant %s", link, want)
		}
	}

	// What a host of the VLAN has is not taken from it.
	w.ip("host", "link add link eth0 name eth0.10 type vlan id 10")
	w.addresses("host", "eth0.10", "10.30.0.13/24 fd30::13/64")
	w.egress("taken", 1, 5, "four 10.30.0.13", "six fd30::13")
	w.eventually(func() error {
		a, err := w.client.Agent(w.Context(), "node-1")
		if len(a.Conflicts) != 2 || err != nil {
			return fmt.Errorf("conflicts %v, %v; want both addresses of the host", a.Conflicts, err)
		}
		for ip, who := range a.Conflicts {
			if !strings.HasSuffix(who, " on link egret.10") {
				return fmt.Errorf("%s: %s", ip, who)
			}
		}
		return nil
	})
	if resp, err := w.client.Etcd().Get(t.Context(), w.client.Prefix()+"owners/10.30.0.13"); err != nil || resp.Count > 0 {
		t.Errorf("10.30.0.13 has an owner: %v, %v", resp, err)
	}
	w.ip("host", "link del eth0.10")
	w.drop("egresses/taken", "members/by-node/node-1/taken", "members/by-egress/taken/node-1")
	all("router-1")

	// As a network operator of the node resets it.
	before := w.in("node-1", "cat", "/proc/sys/net/ipv4/conf/egret.10/rp_filter")
	w.in("node-1", "sh", "-c", "echo 1 >/proc/sys/net/ipv4/conf/egret.10/rp_filter")
	w.eventually(func() error {
		if got := w.in("node-1", "cat", "/proc/sys/net/ipv4/conf/egret.10/rp_filter"); got != "2\n" || before != "2\n" {
			return fmt.Errorf("rp_filter was %q and is %q, want 2", before, got)
		}
		return nil
	})

	// A VLAN that somebody else has is refused, alone; and what is foreign stays.
	w.ip("node-1", "link add link eth0 name theirs type vlan id 50")
	w.addresses("node-1", "theirs", "10.50.0.101/24")
	w.pool("taken", "10.50.0.1/24", 50)
	w.eventually(func() error {
		a, err := w.client.Agent(w.Context(), "node-1")
		if want := "link theirs has VLAN 50 of eth0"; err != nil || !strings.HasPrefix(a.Refused["taken"], want) || len(a.Refused) != 1 {
			return fmt.Errorf("node-1 refuses %v, %v; want %s", a.Refused, err, want)
		}
		return nil
	})
	all("router-1")

	// The pools change while they are in use.
	for name, gateway := range map[string]string{"four": "10.30.0.1/24", "six": "fd30::1/64", "other": "10.30.0.1/24"} {
		w.pool(name, gateway, 20)
	}
	all("router-2")
	w.drop("egresses/near", "egresses/far")
	w.eventually(func() error {
		links := w.in("node-1", "ip", "-br", "link")
		if strings.Contains(links, "egret.10") || strings.Contains(links, "egret.20") || !strings.Contains(links, "theirs") {
			return fmt.Errorf("links\n%s\nwant theirs, and none of ours with a VLAN", links)
		}
		return nil
	})

	// Nothing stays on a node that Egret leaves.
	w.egress("near", 1, 1, "four 10.30.0.10", "six fd30::10")
	w.wantAnswer("pod-1", outside[true], "router-2 10.30.0.10")
	w.stop["node-1"]()
	if links := w.in("node-1", "ip", "-br", "link"); !strings.Contains(links, "egret.20") {
		t.Errorf("links of a stopped agent\n%s\nwant egret.20 still", links)
	}
	if err := netns.Do(w.netns("node-1"), func() error { return agent.Cleanup("", slog.New(slog.DiscardHandler)) }); err != nil {
		t.Error(err)
	}
	if links := w.in("node-1", "ip", "-br", "link"); strings.Contains(links, "egret") || !strings.Contains(links, "theirs") {
		t.Errorf("links\n%s\nwant theirs, and none of ours", links)
	}
}
