// Package integration tests Egret end to end, by packets, in a lab: real etcd, real kube-apiserver, real kernel.
package integration

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/integration/witness"
)

// The lab that the tests of this package share, and the sniffers that watch it from outside over the whole run.
var (
	cluster *lab.Lab
	watch   *witness.Witness
)

const leaseTTL = 3 * time.Second

var part = flag.String("part", "1/1", "I/N: of the tests each Nth from the Ith on, so that N processes run all of them at once, in a lab each")

// choose sets -test.run to the tests of a part.
func choose(part string) error {
	var i, n int
	if _, err := fmt.Sscanf(part, "%d/%d", &i, &n); err != nil || i < 1 || i > n {
		return fmt.Errorf("-part %s: want I/N, 1/3 for one", part)
	}
	if n == 1 {
		return nil
	}
	if run := flag.Lookup("test.run").Value.String(); run != "" {
		return fmt.Errorf("-part %s and -run %s: want one of them", part, run)
	}
	list := exec.Command(os.Args[0], "-test.list", "^Test")
	list.Stderr = os.Stderr
	out, err := list.Output()
	if err != nil {
		return fmt.Errorf("listing the tests: %w", err)
	}
	var chosen []string
	for at, name := range strings.Fields(string(out)) {
		if at%n == i-1 {
			chosen = append(chosen, name)
		}
	}
	if len(chosen) == 0 {
		return errors.New("there are none")
	}
	return flag.Set("test.run", "^("+strings.Join(chosen, "|")+")$")
}

func TestMain(m *testing.M) {
	if status, ok := lab.Helper(os.Args); ok {
		os.Exit(status)
	}
	flag.Parse()
	if flag.Lookup("test.list").Value.String() != "" {
		os.Exit(m.Run())
	}
	if err := choose(*part); err != nil {
		fmt.Fprintln(os.Stderr, "choosing tests:", err)
		os.Exit(1)
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "integration tests make network namespaces: run them as root")
		os.Exit(1)
	}
	os.Exit(run(m))
}

func run(m *testing.M) (status int) {
	ctx := context.Background()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	var err error
	if cluster, err = lab.Up(ctx, lab.Config{Name: lab.OwnName("e2e"), Nodes: 3, EtcdMembers: 3, LeaseTTL: leaseTTL, Log: log}); err != nil {
		fmt.Fprintln(os.Stderr, "starting the lab:", err)
		return 1
	}
	defer func() {
		if err := cluster.Down(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "removing the lab:", err)
			status = 1
		}
	}()
	if watch, err = witness.Start(ctx, cluster); err != nil {
		fmt.Fprintln(os.Stderr, "starting the sniffers:", err)
		return 1
	}
	status = m.Run()
	if err := errors.Join(watch.Stop(), cluster.Panics()); err != nil {
		fmt.Fprintln(os.Stderr, "over the whole run:", err)
		status = 1
	}
	return status
}

func TestSelectedPodsLeaveWithTheirEgressIPAndOthersAsBefore(t *testing.T) {
	n := newNamespace(t)
	n.pool("sources", "10.10.0.11", "10.10.0.12")
	n.egress("sources-web", "sources", "web")
	n.egress("sources-api", "sources", "api")
	webIP, webNode := held(t, "sources-web")
	apiIP, _ := held(t, "sources-api")
	if webIP == apiIP {
		t.Fatalf("both egresses have %s", webIP)
	}
	for _, node := range nodes() {
		web, api, none := n.pod("web-"+node, node, "web"), n.pod("api-"+node, node, "api"), n.pod("none-"+node, node, "db")
		selected(t, web, webIP)
		selected(t, api, apiIP)
		leavesAs(t, none, nodeIP(t, node))
	}
	t.Logf("%s is held by %s; pods there and elsewhere leave with it", webIP, webNode)
	out := strings.Fields(strings.SplitN(kubectl(t, "get", "egress"), "\n", 2)[0])
	if want := []string{"NAME", "EGRESSIP", "AGE", "NODE"}; !slices.Equal(out, want) {
		t.Errorf("kubectl get egress: columns %v, want %v", out, want)
	}
}

func TestPodIsCreatedRelabelledDeletedAndItsIPGivenToAnother(t *testing.T) {
	n := newNamespace(t)
	n.pool("cycle", "10.10.0.13", "10.10.0.13")
	n.egress("cycle", "cycle", "web")
	ip, gateway := held(t, "cycle")
	node := otherNode(gateway)
	pod := n.pod("a", node, "db")
	leavesAs(t, pod, nodeIP(t, node))
	kubectl(t, "label", "--overwrite", "-n", n.name, "pod/a", "app=web")
	leavesAs(t, pod, ip)
	kubectl(t, "label", "--overwrite", "-n", n.name, "pod/a", "app=db")
	leavesAs(t, pod, nodeIP(t, node))
	kubectl(t, "label", "--overwrite", "-n", n.name, "pod/a", "app=web")
	leavesAs(t, pod, ip)
	n.remove(pod)
	heir := n.pod("b", node, "db") // the lab gives out the lowest free address
	leavesAs(t, heir, nodeIP(t, node))
}

func TestPowerOffOfTheGatewayGivesTheSameSourceAgain(t *testing.T) {
	powerOff(t, "off", "10.10.0.14")
}

// powerOff powers the gateway of an egress off, and wants another to take over in time.
func powerOff(t *testing.T, name, address string) {
	t.Helper()
	n := newNamespace(t)
	ip, gateway, pod := n.remote(name, address)
	result := probeTo(t, outsideOf(ip), pod, leaseTTL+4*time.Second, func() {
		if err := cluster.Crash(t.Context(), gateway); err != nil {
			t.Fatal(err)
		}
	})
	t.Cleanup(func() {
		if err := cluster.Recover(context.Background(), gateway); err != nil {
			t.Errorf("recovering %s: %v", gateway, err)
		}
	})
	if _, owner := lookUp(t, name); owner == gateway || owner == "" {
		t.Errorf("the owner is %q after %s went", owner, gateway)
	}
	ownershipLogged(t, ip, []string{
		fmt.Sprintf(`msg="egress IP claimed" egress_ip=%s egress=[%s] why=`, ip, name),
		fmt.Sprintf(`msg="egress IP claimed" egress_ip=%s egress=[%s] why=crash from=%s`, ip, name, gateway),
	})
	only(t, result, ip)
	if limit := leaseTTL + 1500*time.Millisecond; result.LongestGap > limit {
		t.Errorf("%v without an answer, want at most %v", result.LongestGap, limit)
	}
	t.Logf("longest gap %v", result.LongestGap)
}

func TestFrozenOwnerStopsAnsweringAndAnotherTakesOver(t *testing.T) {
	ip, gateway, began := takeOver(t, "frozen", "10.10.0.15", cluster.Freeze, cluster.Thaw)
	if silent := watch.LastAnswer(ip, gateway).Sub(began); silent > time.Second {
		t.Errorf("%s answered for %s for %v after its agent was frozen", gateway, ip, silent)
	}
}

// TestNodeThatWasPausedIsSilentWhenItGoesOn: neither agent nor link, and then both at once. The clock of its kernel
// runs on.
func TestNodeThatWasPausedIsSilentWhenItGoesOn(t *testing.T) {
	takeOver(t, "paused", "10.10.0.79", func(ctx context.Context, node string) error {
		return errors.Join(cluster.Freeze(ctx, node), cluster.Cut(ctx, node, "uplink"))
	}, func(ctx context.Context, node string) error {
		return errors.Join(cluster.Heal(ctx, node, "uplink"), cluster.Thaw(ctx, node))
	})
}

// The kernel is silent about an address of another link there, as kube-proxy wants it for IPVS.
func TestStrictARP(t *testing.T) {
	set := func(ignore, announce string) {
		for _, node := range nodes() {
			if out, err := cluster.Exec(context.Background(), "node", node, "sysctl", "-qw", "net.ipv4.conf.all.arp_ignore="+ignore,
				"net.ipv4.conf.all.arp_announce="+announce); err != nil {
				t.Errorf("%s: %v\n%s", node, err, out)
			}
		}
	}
	set("1", "2")
	t.Cleanup(func() { set("0", "0") })
	t.Run("frozen", func(t *testing.T) {
		ip, gateway, began := takeOver(t, "strict", "10.10.0.33", cluster.Freeze, cluster.Thaw)
		last := watch.LastAnswer(ip, gateway)
		if silent := last.Sub(began); last.IsZero() || silent > time.Second {
			t.Errorf("%s answered for %s last %v after its agent was frozen", gateway, ip, silent)
		}
		out, err := cluster.Exec(t.Context(), "outside", "", "arping", "-b", "-c1", "-w1", "-I", "eth0", ip.String())
		if err != nil || !strings.Contains(string(out), "Received 1 response") {
			t.Errorf("asked once: %v\n%s", err, out)
		}
	})
	t.Run("off", func(t *testing.T) { powerOff(t, "strict-off", "10.10.0.34") })
}

func TestCordonedOwnerIsSilentBeforeAnotherAnswers(t *testing.T) {
	etcd := etcdClient(t)
	var cordoned string
	cordon := func(ctx context.Context, node string) error {
		cordoned = node
		_, err := etcd.Put(ctx, "/egret/cordons/"+node, fmt.Sprintf(`{"node": %q, "why": "test"}`, node))
		if err == nil {
			// At the worst moment: the agent's last words must not extend what it gives away.
			time.Sleep(20 * time.Millisecond)
			err = cluster.Stop(ctx, "agent", node)
		}
		return err
	}
	uncordon := func(ctx context.Context, node string) error {
		_, err := etcd.Delete(ctx, "/egret/cordons/"+node)
		return errors.Join(err, cluster.Start(ctx, "agent", node))
	}
	takeOver(t, "cordon", "10.10.0.20", cordon, uncordon)
	if cordoned == "" {
		t.Error("nobody was cordoned")
	}
}

func TestNodeThatLosesItsAddressLetsGo(t *testing.T) {
	on := func(ctx context.Context, node string, lines ...string) error {
		n, err := cluster.NodeNumber(node)
		if err != nil {
			return err
		}
		for _, line := range lines {
			line = strings.ReplaceAll(line, "ADDRESS", lab.NodeIP(n).String()+"/24")
			if out, err := cluster.Exec(ctx, "node", node, strings.Fields(line)...); err != nil {
				return fmt.Errorf("%s: %w\n%s", line, err, out)
			}
		}
		return nil
	}
	lose := func(ctx context.Context, node string) error {
		// Another address keeps the way to etcd open: the lease lives, the overlay does not.
		return on(ctx, node, "sysctl -qw net.ipv4.conf.eth0.promote_secondaries=1", "ip addr add 10.10.0.199/24 dev eth0", "ip addr del ADDRESS dev eth0")
	}
	regain := func(ctx context.Context, node string) error {
		return on(ctx, node, "ip addr add ADDRESS dev eth0", "ip addr del 10.10.0.199/24 dev eth0", "sysctl -qw net.ipv4.conf.eth0.promote_secondaries=0")
	}
	takeOver(t, "address", "10.10.0.27", lose, regain)
}

// takeOver breaks the owner of an IP while the outside host asks for the IP all the time, waits until another node
// serves, and mends the former owner, which must keep silent. The witness counts who answers when.
func takeOver(t *testing.T, name, address string, breaks, mend func(context.Context, string) error) (ip netip.Addr, gateway string, began time.Time) {
	t.Helper()
	n := newNamespace(t)
	ip, gateway, pod := n.remote(name, address)
	stopAsking := askWhoHas(t, ip)
	if err := breaks(t.Context(), gateway); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	mended := false
	t.Cleanup(func() {
		if !mended {
			_ = mend(context.Background(), gateway) // the test has failed already
		}
	})
	eventually(t, leaseTTL+5*time.Second, func() error {
		if _, owner := lookUp(t, name); owner == gateway || owner == "" {
			return fmt.Errorf("the owner is %q", owner)
		}
		return nil
	})
	leavesAs(t, pod, ip)
	t.Logf("another node serves after %v; the former owner spoke last after %v", time.Since(began).Round(time.Millisecond),
		max(watch.LastAnswer(ip, gateway).Sub(began), 0).Round(time.Millisecond))
	if err := mend(t.Context(), gateway); err != nil {
		t.Fatal(err)
	}
	mended = true
	time.Sleep(2 * time.Second) // for the former owner to do what it must not
	stopAsking()
	leavesAs(t, pod, ip)
	if err := watch.Doubles(); err != nil {
		t.Error(err)
	}
	return ip, gateway, began
}

func TestPlannedMoveLosesNoPacket(t *testing.T) {
	plannedMove(t, "move", "10.10.0.18")
}

// plannedMove moves an IP to every kind of node, the pod's own among them, and wants nothing lost.
func plannedMove(t *testing.T, name, address string) {
	t.Helper()
	n := newNamespace(t)
	ip, gateway, pod := n.remote(name, address)
	node := otherNode(gateway)
	other := otherNode(gateway, node)
	connection, err := cluster.Converse(t.Context(), pod, outsideOf(ip))
	if err != nil {
		t.Fatal(err)
	}
	defer connection.Close()
	move := func(to string) lab.ProbeResult {
		t.Helper()
		result := probeTo(t, outsideOf(ip), pod, 3*time.Second, func() {
			t.Log(strings.TrimSpace(egret(t, "move", ip.String(), "--to", to)))
			if _, owner := lookUp(t, name); owner != to {
				t.Errorf("the owner is %s, want %s", owner, to)
			}
		})
		only(t, result, ip)
		t.Logf("sent %d, lost %d, longest gap %v", result.Sent, result.Lost, result.LongestGap)
		if err := connection.Exchange(2 * time.Second); err != nil {
			t.Error(err)
		}
		return result
	}
	for _, to := range []string{other, gateway, node, gateway} {
		lossless(t, "move to "+to, move(to))
	}
}

// TestAnswersThatCameToTheFormerOwnerTakeNoPort has the outside host learn late where an IP went. The former owner
// passes its answers on, to the pod's node, and keeps nothing of them. When the IP comes back, the connections are as
// they were.
func TestAnswersThatCameToTheFormerOwnerTakeNoPort(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("late", "10.10.0.37")
	next := otherNode(gateway, otherNode(gateway))
	outside := func(args ...string) string {
		t.Helper()
		out, err := cluster.Exec(t.Context(), "outside", "", args...)
		if err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	mac, err := cluster.Exec(t.Context(), "node", gateway, "cat", "/sys/class/net/eth0/address")
	if err != nil {
		t.Fatal(err)
	}
	outside("ip", "neigh", "replace", ip.String(), "lladdr", strings.TrimSpace(string(mac)), "dev", "eth0", "nud", "permanent")
	t.Cleanup(func() {
		// The test may have done so.
		_, _ = cluster.Exec(context.Background(), "outside", "", "ip", "neigh", "del", ip.String(), "dev", "eth0")
	})
	egret(t, "move", ip.String(), "--to", next)
	time.Sleep(time.Second) // until the pod's node has it, too: the former owner is not to know the connection
	result := probe(t, pod, 12*time.Second, func() {
		time.Sleep(time.Second)
		out, err := cluster.Exec(t.Context(), "node", gateway, "conntrack", "-L", "--orig-dst", ip.String())
		if err != nil || strings.Contains(string(out), "udp") {
			t.Errorf("%s keeps connections of answers:\n%s%v", gateway, out, err)
		}
		outside("ip", "neigh", "del", ip.String(), "dev", "eth0")
		time.Sleep(6 * time.Second) // until the former owner forwards no more
		egret(t, "move", ip.String(), "--to", gateway)
	})
	only(t, result, ip)
	lossless(t, "from "+gateway+" to "+next+" and back", result)
}
