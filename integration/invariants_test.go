package integration

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
)

// The invariants are numbered as in docs/design.md. The sixth is plan's.

func TestInvariant1NoTwoNodesAnswerForOneIP(t *testing.T) {
	n := newNamespace(t)
	n.pool("inv1", "10.10.0.21", "10.10.0.21")
	n.egress("inv1", "inv1", "web")
	ip, _ := held(t, "inv1")
	stop := askWhoHas(t, ip)
	for range 2 {
		for _, to := range nodes() {
			egret(t, "move", ip.String(), "--to", to)
		}
	}
	_, gateway := held(t, "inv1")
	if err := cluster.Freeze(t.Context(), gateway); err != nil {
		t.Fatal(err)
	}
	eventually(t, leaseTTL+5*time.Second, func() error {
		if _, owner := lookUp(t, "inv1"); owner == gateway || owner == "" {
			return fmt.Errorf("the owner is %q", owner)
		}
		return nil
	})
	if err := cluster.Thaw(t.Context(), gateway); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second) // the thawed agent wakes up believing that it is the owner
	stop()
	if err := watch.Doubles(); err != nil {
		t.Error(err)
	}
}

func TestInvariant2NoPacketOfASelectedPodLeavesWithAnotherSource(t *testing.T) {
	n := newNamespace(t)
	n.pool("inv2", "10.10.0.22", "10.10.0.22")
	n.egress("inv2", "inv2", "web")
	ip, gateway := held(t, "inv2")
	local, remote := n.pod("local", gateway, "web"), n.pod("remote", otherNode(gateway), "web")
	selected(t, local, ip)
	selected(t, remote, ip)
	done := make(chan error, 1)
	go func() {
		r, err := cluster.Probe(t.Context(), local, time.Millisecond, 4*time.Second)
		if err == nil && len(r.Sources) != 1 {
			err = fmt.Errorf("sources %v", r.Sources)
		}
		done <- err
	}()
	only(t, probe(t, remote, 4*time.Second, func() {
		for _, to := range append(nodes(), gateway) {
			egret(t, "move", ip.String(), "--to", to)
		}
	}), ip)
	if err := <-done; err != nil {
		t.Error(err)
	}
	// An owner that is gone leaves nobody to send with its IP: dropped, not sent as the node.
	kubectl(t, "delete", "externalippool", "inv2")
	eventually(t, 5*time.Second, func() error {
		for _, o := range records[egress.Owner](t, "owners") { // the egress may have lost the IP before
			if o.IP == ip {
				return fmt.Errorf("%s still holds it", o.Node)
			}
		}
		return nil
	})
	if got, err := cluster.Source(t.Context(), remote); err == nil {
		t.Errorf("without an owner the outside host saw %s", got)
	}
	if err := watch.Strangers(); err != nil {
		t.Error(err)
	}
}

func TestInvariant3NothingThatIsNotOursIsWrittenOrRemoved(t *testing.T) {
	n := newNamespace(t)
	n.pool("inv3", "10.10.0.23", "10.10.0.23")
	n.egress("inv3", "inv3", "web")
	ip, gateway := held(t, "inv3")
	selected(t, n.pod("web", gateway, "web"), ip)
	to := otherNode(gateway)
	on := func(line string) string {
		t.Helper()
		out, err := cluster.Exec(t.Context(), "node", gateway, strings.Fields(line)...)
		if err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
		return string(out)
	}
	for _, line := range alike {
		on(line)
	}
	t.Cleanup(func() {
		for _, line := range slices.Backward(alike) {
			undo := strings.NewReplacer(" add ", " del ", "nft add", "nft delete").Replace(line)
			undo, _, _ = strings.Cut(undo, " {")
			// the test has failed, if this does
			_, _ = cluster.Exec(context.Background(), "node", gateway, strings.Fields(undo)...)
		}
	})
	foreign := func() string {
		var b strings.Builder
		for _, line := range strings.Split(strings.TrimSpace(on("nft list tables")), "\n") {
			if line != "table inet egret" && line != "table arp egret" && line != "table netdev egret" {
				b.WriteString(stable(on("nft list " + line)))
			}
		}
		for _, command := range []string{"ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all", "ip -o addr", "ip -o link"} {
			for _, line := range strings.Split(on(command), "\n") {
				// The kernel's own: the local route of an address on egret0, and the guard's mark that it leads
				// somewhere.
				if !ours.MatchString(line) && !strings.Contains(line, "egret0") && !strings.Contains(line, "egret.v") &&
					// The pod's link is some moments old: its link-local address is still on its way.
					!strings.Contains(line, "fe80:") {
					b.WriteString(strings.Join(strings.Fields(line), " ") + "\n")
				}
			}
		}
		for _, name := range []string{"all", "default", "eth0", "cni0"} {
			for _, key := range []string{"rp_filter", "arp_ignore", "arp_announce", "forwarding", "src_valid_mark", "accept_local"} {
				b.WriteString(on("cat /proc/sys/net/ipv4/conf/" + name + "/" + key))
			}
		}
		return b.String()
	}
	before := foreign()
	shareTables(t, gateway)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	writes := capture(ctx, t, gateway, "nft monitor")
	// Everything that the agent does: its state made from nothing, an IP that goes and comes, a restart.
	for _, line := range []string{"nft delete table inet egret", "nft delete table arp egret", "nft delete table netdev egret", "ip link del egret.vx", "ip link del egret0"} {
		on(line)
	}
	eventually(t, 3*time.Second, func() error {
		out, err := cluster.Exec(t.Context(), "node", gateway, "ip", "-br", "addr", "show", "egret0")
		if err != nil || !bytes.Contains(out, []byte(ip.String())) {
			return fmt.Errorf("egret0: %s", out)
		}
		return nil
	})
	egret(t, "move", ip.String(), "--to", to)
	egret(t, "move", ip.String(), "--to", gateway)
	restart(t, gateway)
	if diff := cmp.Diff(before, foreign()); diff != "" {
		t.Errorf("what is not ours (-before +after):\n%s", diff)
	}
	stop()
	for write := range strings.Lines(writes()) {
		if !ownTable.MatchString(strings.TrimSpace(write)) {
			t.Errorf("written: %s", write)
		}
	}
}

// ours is what ip prints of rules and routes that are Egret's: table 6999 and priority 2000 are not, whatever the
// protocol.
var ours = regexp.MustCompile(`^1[0-9]{3}:.* proto 94| table (7[0-9]{3}|1[0-5][0-9]{3}) .*proto 94`)

// ownTable is what nft monitor prints of a change of Egret's tables.
var ownTable = regexp.MustCompile(`^(add|delete|replace|insert|destroy) \w+ (inet|arp|netdev) egret( |$)|^# new generation |^$`)

func restart(t *testing.T, node string) {
	t.Helper()
	if err := cluster.Stop(t.Context(), "agent", node); err != nil {
		t.Fatal(err)
	}
	if err := cluster.Start(t.Context(), "agent", node); err != nil {
		t.Fatal(err)
	}
}

// recent are the sets of what was dropped in the last 30 s, by whatever test, of which nodes and pods sent in the last
// second, and of who was delayed.
var recent = regexp.MustCompile(`(?s)\tset (guarded|heard[46]|came[46]|seen[46]|held[46]) \{.*?\n\t\}\n`)

// kernel returns all of ours on a node but the clocks of the permits, and what was dropped.
func kernel(t *testing.T, node string) string {
	t.Helper()
	var b strings.Builder
	for _, line := range []string{"nft list table inet egret", "nft list table arp egret", "nft list table netdev egret", "ip rule", "ip route show table all proto 94", "ip addr show egret0", "bridge fdb show dev egret.vx"} {
		out, err := cluster.Exec(t.Context(), "node", node, strings.Fields(line)...)
		if err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
		b.WriteString(recent.ReplaceAllString(stable(string(out)), "") + "\n")
	}
	return clocks.ReplaceAllString(b.String(), "")
}

func TestInvariant4AnErrorOrAPartialReadNeverCausesADelete(t *testing.T) {
	n := newNamespace(t)
	n.pool("inv4", "10.10.0.24", "10.10.0.25")
	n.egress("inv4-a", "inv4", "web")
	n.egress("inv4-b", "inv4", "api")
	ipA, gatewayA := held(t, "inv4-a")
	ipB, gatewayB := held(t, "inv4-b")
	web, api := n.pod("web", otherNode(gatewayA), "web"), n.pod("api", otherNode(gatewayB), "api")
	selected(t, web, ipA)
	selected(t, api, ipB)
	owners := ownership(t)

	t.Run("a record that cannot be read", func(t *testing.T) {
		etcd := etcdClient(t)
		const key = "/egret/egresses/inv4-a"
		good, err := etcd.Get(t.Context(), key)
		if err != nil || len(good.Kvs) != 1 {
			t.Fatalf("reading %s: %v", key, err)
		}
		// crdsync is the key's writer: it must not mend it while we look.
		if err := cluster.Stop(t.Context(), "crdsync", ""); err != nil {
			t.Fatal(err)
		}
		if _, err := etcd.Put(t.Context(), key, `{"name": "inv4-a", "addresses": [{"ip": "no`); err != nil {
			t.Fatal(err)
		}
		eventually(t, 5*time.Second, func() error {
			log, err := os.ReadFile(cluster.LogFile("agent-" + gatewayA))
			if err != nil || !bytes.Contains(log, []byte("egresses/inv4-a")) {
				return fmt.Errorf("the agent of %s does not name the record in its log (%v)", gatewayA, err)
			}
			return nil
		})
		leavesAs(t, web, ipA)
		leavesAs(t, api, ipB)
		// An agent that has never seen a better record takes over what is in its kernel.
		restart(t, gatewayA)
		restart(t, otherNode(gatewayA))
		time.Sleep(time.Second)
		leavesAs(t, web, ipA)
		leavesAs(t, api, ipB)
		if out, err := cluster.Egret(t.Context(), "get", "egresses"); err == nil || !bytes.Contains(out, []byte("inv4-b")) || !strings.Contains(fmt.Sprint(string(out), err), "egresses/inv4-a") {
			t.Errorf("egret get egresses: %v\n%s\nwant the other egresses, and an error that names the record", err, out)
		}
		if err := cluster.Start(t.Context(), "crdsync", ""); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, func() error {
			now, err := etcd.Get(t.Context(), key)
			if err != nil || len(now.Kvs) != 1 || !bytes.Equal(now.Kvs[0].Value, good.Kvs[0].Value) {
				return fmt.Errorf("crdsync has not mended %s: %v, %v", key, now, err)
			}
			return nil
		})
	})

	t.Run("etcd away for longer than the lease", func(t *testing.T) {
		before := map[string]string{}
		for _, node := range nodes() {
			before[node] = kernel(t, node)
		}
		if err := cluster.Stop(t.Context(), "etcd", ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(leaseTTL + 2*time.Second) // the outage itself
		for _, node := range nodes() {
			if diff := cmp.Diff(before[node], kernel(t, node)); diff != "" {
				t.Errorf("%s, during the outage (-before +during):\n%s", node, diff)
			}
		}
		if err := cluster.Start(t.Context(), "etcd", ""); err != nil {
			t.Fatal(err)
		}
		leavesAs(t, web, ipA)
		leavesAs(t, api, ipB)
		if after := ownership(t); !maps.Equal(owners, after) {
			t.Errorf("owners before %v, after %v", owners, after)
		}
	})
}

// steady is how long the steady state is looked at.
const steady = time.Minute

func TestInvariant5ASteadyStateAndARestartWriteNothing(t *testing.T) {
	n := newNamespace(t)
	_, gateway, _ := n.remote("inv5", "10.10.0.26")
	time.Sleep(2 * time.Second) // what the pod set going comes to rest: status in the API, burst of announcements
	for name, during := range map[string]func(){
		"a steady state": func() { time.Sleep(steady) },
		"a restart":      func() { restart(t, gateway); time.Sleep(2 * time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			etcd := etcdClient(t)
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			writes := map[string]func() string{}
			for _, line := range []string{"nft monitor", "ip monitor link address route rule netconf", "bridge monitor fdb"} {
				writes[line] = capture(ctx, t, gateway, line)
			}
			before := revision(t, etcd)
			during()
			want, most := 0, 2
			if name == "a restart" {
				// the locks move to a lease that outlives the restart, and from there to another; the next agent's
				// record, and that it is ready
				want = 4
				most = 7 // the permits are extended, and cut, and the tables taken over
			}
			// Every so often crdsync notes which revision etcd has, to know by then what may be compacted.
			// An agent that a busy machine delays may be suspected, and says at once that it lives.
			got := slices.DeleteFunc(written(t, etcd, before), func(change string) bool {
				return strings.HasSuffix(change, "PUT /egret/compaction") || strings.Contains(change, " /egret/suspicions/")
			})
			if len(got) != want {
				t.Errorf("%d transactions in etcd, want %d:\n%s", len(got), want, strings.Join(got, "\n"))
			}
			stop()
			commits := 0
			for line, output := range writes {
				for _, change := range strings.Split(strings.TrimSpace(output()), "\n") {
					if strings.HasPrefix(change, "# new generation ") {
						commits++
					}
					if change != "" && !renewal.MatchString(change) && (name != "a restart" || !takeover.MatchString(change)) {
						t.Errorf("%s: %s", line, change)
					}
				}
			}
			if t.Logf("%d commits", commits); commits > most {
				t.Errorf("%d commits, want %d at most: who reads the ruleset begins again with each", commits, most)
			}
		})
	}
}

// capture runs a command on a node until ctx ends; the function that it returns waits for its end and returns what it
// printed.
func capture(ctx context.Context, t *testing.T, node, line string) func() string {
	t.Helper()
	type result struct {
		out []byte
		err error
	}
	done := make(chan result, 1)
	go func() {
		out, err := cluster.Exec(ctx, "node", node, strings.Fields(line)...)
		done <- result{out, err}
	}()
	time.Sleep(300 * time.Millisecond) // until it listens
	return func() string {
		r := <-done
		if ctx.Err() == nil {
			t.Errorf("%s: %v", line, r.err)
		}
		return string(r.out)
	}
}

func revision(t *testing.T, c *clientv3.Client) int64 {
	t.Helper()
	r, err := c.Get(t.Context(), "/egret/", clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		t.Fatal(err)
	}
	return r.Header.Revision
}

// written returns what was written to etcd after a revision, a line for each transaction, but for blocks of ports of
// earlier tests that have rested: those are deleted two minutes after their pods.
func written(t *testing.T, c *clientv3.Client, after int64) (lines []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	end := revision(t, c)
	watch := c.Watch(ctx, "/egret/", clientv3.WithPrefix(), clientv3.WithRev(after+1))
	keys := map[int64][]string{}
	for seen := after; seen < end; {
		r, ok := <-watch
		if !ok || r.Err() != nil {
			t.Fatalf("watching etcd from revision %d to %d: %v, %v", after, end, r.Err(), ctx.Err())
		}
		for _, e := range r.Events {
			seen = max(seen, e.Kv.ModRevision)
			// Blocks of what is gone rest for a while.
			if strings.HasPrefix(string(e.Kv.Key), "/egret/blocks-history/") || e.Type == clientv3.EventTypeDelete && strings.HasPrefix(string(e.Kv.Key), "/egret/blocks/") {
				continue
			}
			keys[e.Kv.ModRevision] = append(keys[e.Kv.ModRevision], fmt.Sprintf("%v %s", e.Type, e.Kv.Key))
		}
	}
	for _, revision := range slices.Sorted(maps.Keys(keys)) {
		lines = append(lines, fmt.Sprintf("%d: %s", revision, strings.Join(keys[revision], ", ")))
	}
	return lines
}

// etcdClient returns a client of some members of etcd; none named: of all.
func etcdClient(t *testing.T, members ...string) *clientv3.Client {
	t.Helper()
	var endpoints []string
	for i, name := range cluster.EtcdMembers() {
		if len(members) == 0 || slices.Contains(members, name) {
			endpoints = append(endpoints, cluster.EtcdEndpoints()[i])
		}
	}
	c, err := clientv3.New(clientv3.Config{Endpoints: endpoints, DialTimeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func TestInvariant8AnAllocatedIPNeverChangesByItself(t *testing.T) {
	n := newNamespace(t)
	n.pool("inv8", "10.10.0.31", "10.10.0.39")
	names := []string{"inv8-c", "inv8-a", "inv8-b"}
	for _, name := range names {
		n.egress(name, "inv8", name)
		held(t, name)
	}
	// A hole below them: whoever allocates anew would take it.
	kubectl(t, "delete", "egress", "inv8-c")
	allocations := func() map[string]netip.Addr {
		out := map[string]netip.Addr{}
		for _, a := range records[egress.Allocation](t, "allocations") {
			if a.Pool == "inv8" {
				out[strings.Join(a.Egresses, ",")] = a.IP
			}
		}
		return out
	}
	eventually(t, 5*time.Second, func() error {
		if got := allocations(); len(got) != 2 {
			return fmt.Errorf("allocations %v, want two", got)
		}
		return nil
	})
	before := allocations()
	_, gateway := held(t, "inv8-a")
	steps := []struct {
		name string
		do   func() error
	}{
		{"crdsync restarted", func() error { return twice(t, "crdsync") }},
		{"etcd restarted", func() error { return twice(t, "etcd") }},
		{"API server restarted", func() error { return twice(t, "apiserver") }},
		{"gateway powered off", func() error { return cluster.Crash(t.Context(), gateway) }},
		{"gateway back", func() error { return cluster.Recover(t.Context(), gateway) }},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		for _, name := range names[1:] {
			held(t, name)
		}
		if after := allocations(); !maps.Equal(before, after) {
			t.Errorf("%s: allocations before %v, after %v", s.name, before, after)
		}
	}
	// crdsync works on: a new egress gets the hole.
	n.egress("inv8-d", "inv8", "d")
	ip, _ := held(t, "inv8-d")
	if slices.Contains(slices.Collect(maps.Values(before)), ip) {
		t.Errorf("the new egress has %s, which is taken: %v", ip, before)
	}
}

func twice(t *testing.T, what string) error {
	if err := cluster.Stop(t.Context(), what, ""); err != nil {
		return err
	}
	return cluster.Start(t.Context(), what, "")
}
