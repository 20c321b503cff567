package main

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/store"
)

const troubleshootingFile = "../../docs/troubleshooting.md"

// exampleAt marks an example of the page: the block below it is what the commands in it print where etcd is so.
var exampleAt = regexp.MustCompile(`^<!-- example: ([a-z-]+) -->$`)

// TestTheTroubleshootingPageShowsWhatCommandsPrint runs each command of each example against records that are as in the
// symptom.
func TestTheTroubleshootingPageShowsWhatCommandsPrint(t *testing.T) {
	have, err := os.ReadFile(troubleshootingFile)
	if err != nil {
		t.Fatal(err)
	}
	server := etcdtest.New(t)
	leases(t, server)
	used := map[string]bool{}
	var want strings.Builder
	lines := strings.SplitAfter(string(have), "\n")
	for i := 0; i < len(lines); i++ {
		want.WriteString(lines[i])
		m := exampleAt.FindStringSubmatch(strings.TrimSuffix(lines[i], "\n"))
		if m == nil {
			continue
		}
		name := m[1]
		want.WriteString("\n")
		for i++; i < len(lines) && lines[i] == "\n"; i++ {
		}
		var commands []string
		for ; i < len(lines) && (strings.HasPrefix(lines[i], "    ") || lines[i] == "\n"); i++ {
			if command, ok := strings.CutPrefix(lines[i], "    $ "); ok {
				commands = append(commands, strings.TrimSpace(command))
			}
		}
		i--
		build, known := states[name]
		if !known || len(commands) == 0 {
			t.Errorf("example %s: %d commands; is there such a state: %t", name, len(commands), known)
			continue
		}
		used[name] = true
		t.Run(name, func(t *testing.T) {
			s := newState(t, server, fmt.Sprintf("/state-%d/", i))
			build(s)
			for _, command := range commands {
				fmt.Fprintf(&want, "    $ %s\n", command)
				for line := range strings.Lines(s.prints(command)) {
					if line = strings.TrimRight(line, " \n"); line != "" {
						line = "    " + line
					}
					want.WriteString(line + "\n")
				}
			}
			want.WriteString("\n")
		})
	}
	for name := range states {
		if !used[name] {
			t.Errorf("state %s is not on the page", name)
		}
	}
	if *update {
		if err := os.WriteFile(troubleshootingFile, []byte(want.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(string(have), want.String()); diff != "" {
		t.Errorf("docs/troubleshooting.md does not show what commands print: go test ./cmd/egret -run Troubleshooting -update (-have +want):\n%s", diff)
	}
}

// Commands that pages name, and the options that they have there, are there.
func TestCommandsThatPagesNameAreThere(t *testing.T) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile("(?m)(?:`|^ {4,}(?:\\$ )?)(?:kubectl )?egret ([a-z](?:[^`;\n]|\\\\\n)*)")
	option := regexp.MustCompile(`(?:^|\s|\[)--([a-z0-9-]+)`)
	total := 0
	for _, page := range append(pages, "../../README.md") {
		b, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range named.FindAllStringSubmatch(string(b), -1) {
			total++
			line, r := m[1], root()
			r.InitDefaultCompletionCmd("status") // cobra adds it when a command runs
			c, rest, err := r.Find(strings.Fields(strings.NewReplacer("|", " ", "[", " ").Replace(line)))
			if err != nil || c == r {
				t.Errorf("%s: there is no command `egret %s`: %v", page, line, err)
				continue
			}
			c.InitDefaultHelpFlag()
			for _, o := range option.FindAllStringSubmatch(line, -1) {
				if c.Flags().Lookup(o[1]) == nil && c.InheritedFlags().Lookup(o[1]) == nil {
					t.Errorf("%s: `egret %s`: %s has no option --%s (%q)", page, line, c.CommandPath(), o[1], rest)
				}
			}
		}
	}
	if total < 100 {
		t.Errorf("%d commands were found on %d pages", total, len(pages)+1)
	}
}

// What the states have in common.
const (
	lease1, lease2, lease3 = 0x6a6ca20ac6dc7c06, 0x6a6ca20ac6dc7c14, 0x6a6ca20ac6dc7c22
	ourPool                = "external-ip-pool"
	ourEgress              = "egress-prod-web"
)

var ourIP = netip.MustParseAddr("10.10.0.11")

// leases makes those that agents would have.
func leases(t *testing.T, server *etcdtest.Server) {
	t.Helper()
	client := pb.NewLeaseClient(dialed(t, server.Endpoint(), "").Etcd().ActiveConnection())
	for _, id := range []int64{lease1, lease2, lease3} {
		if _, err := client.LeaseGrant(t.Context(), &pb.LeaseGrantRequest{ID: id, TTL: 600}); err != nil {
			t.Fatal(err)
		}
	}
}

// clusterState is a cluster as etcd has it.
type clusterState struct {
	*testing.T
	client *store.Client
	server *etcdtest.Server
	now    time.Time
	hidden map[string]string // what differs each time, and what stands for it on the page
}

// newState returns a cluster of three nodes in which all is well: node-2 holds the IP of the egress, and node-1 and
// node-3 have its pods.
func newState(t *testing.T, server *etcdtest.Server, prefix string) *clusterState {
	s := &clusterState{t, dialed(t, server.Endpoint(), prefix), server, time.Now().UTC().Truncate(time.Second), map[string]string{server.Endpoint(): "10.0.0.1:2379"}}
	t.Chdir(t.TempDir())
	t.Setenv("ETCDCTL_ENDPOINTS", server.Endpoint())
	t.Setenv("EGRET_ETCD_PREFIX", prefix)
	for i, lease := range []int64{lease1, lease2, lease3} {
		name := fmt.Sprintf("node-%d", i+1)
		s.put(store.NodeKey(name), egress.Node{Name: name, Index: i + 1, Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 10, 0, byte(101 + i)})},
			PodCIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(i + 1), 0}), 24)}, Capacity: 255})
		s.agent(name, lease, nil)
	}
	s.put(store.PoolKey(ourPool), egress.Pool{Name: ourPool, Ranges: []egress.Range{{Start: ourIP, End: ourIP.Next()}}})
	s.policy(ourEgress, ourIP)
	s.owner("node-2", lease2)
	s.members("node-1", true, "prod/web-1")
	s.members("node-3", true, "prod/web-3")
	s.put(store.MembersByNodeKey("node-1", "-"), egress.Members{Egress: "-", Node: "node-1", Pods: []egress.Member{{Pod: "prod/db-1", IPs: []netip.Addr{netip.MustParseAddr("10.244.1.9")}}}})
	s.put(store.ServiceKey("kubernetes"), egress.ServiceCIDR{Name: "kubernetes", CIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}})
	s.put("elections/crdsync/1", "egret-crdsync-6f7c9-x2x7q")
	return s
}

// put writes a record; del deletes one.
func (s *clusterState) put(key string, record any) { s.under(key, record, 0) }

func (s *clusterState) under(key string, record any, lease int64) {
	s.Helper()
	value, err := store.Encode(record)
	if text, ok := record.(string); ok {
		value = []byte(text)
	}
	if err == nil {
		_, err = s.client.Etcd().Put(s.Context(), s.client.Prefix()+key, string(value), clientv3.WithLease(clientv3.LeaseID(lease)))
	}
	if err != nil {
		s.Fatal(err)
	}
}

func (s *clusterState) del(key string) {
	s.Helper()
	if _, err := s.client.Etcd().Delete(s.Context(), s.client.Prefix()+key); err != nil {
		s.Fatal(err)
	}
}

// ago is so long before now, and half a minute: what is printed of it does not change while the test runs.
func (s *clusterState) ago(d time.Duration) time.Time { return s.now.Add(-d - 30*time.Second) }

func (s *clusterState) agent(node string, lease int64, change func(*egress.Agent)) {
	i := int(node[len(node)-1] - '0')
	a := egress.Agent{Node: node, Address: netip.AddrFrom4([4]byte{10, 10, 0, byte(100 + i)}), Lease: egress.FormatLease(lease), Version: "v1.4.0",
		Since: s.ago(26 * time.Hour), Permit: egress.Duration(500 * time.Millisecond)}
	if change != nil {
		change(&a)
	}
	s.under(store.AgentKey(node), a, lease)
}

func (s *clusterState) policy(name string, ips ...netip.Addr) {
	p := egress.Policy{Name: name, Created: s.ago(30 * time.Hour), Addresses: []egress.Address{}}
	for _, ip := range ips {
		id := egress.ID(ip.As4()[3] - 10)
		p.Addresses = append(p.Addresses, egress.Address{IP: ip, ID: id, Pool: ourPool})
		s.put(store.AllocationKey(ip), egress.Allocation{IP: ip, Pool: ourPool, ID: id, Egresses: []string{name}, Since: p.Created})
	}
	s.put(store.EgressKey(name), p)
}

func (s *clusterState) owner(node string, lease int64) {
	s.under(store.OwnerKey(ourIP), egress.Owner{IP: ourIP, Node: node, Since: s.ago(25 * time.Hour), Why: egress.ReasonClaim}, lease)
}

// members puts a pod of the egress, and, where its node has ports of the IP, a block.
func (s *clusterState) members(node string, ports bool, pod string) {
	i := node[len(node)-1] - '0'
	m := egress.Members{Egress: ourEgress, Node: node, Pods: []egress.Member{{Pod: pod, IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 244, i, 5})}}}}
	if ports {
		m.Blocks = []egress.Block{{IP: ourIP, First: 2048 + 1024*uint16(i-1), Size: 1024, Node: node, Since: s.ago(25 * time.Hour)}}
		s.put(store.BlockKey(ourIP, m.Blocks[0].First), m.Blocks[0])
	}
	s.put(store.MembersByNodeKey(node, ourEgress), m)
	s.put(store.MembersByEgressKey(ourEgress, node), m)
}

func (s *clusterState) tenure(ago time.Duration, node string, why egress.Reason, from, by string) {
	h := egress.Tenure{IP: ourIP, Node: node, Since: s.ago(ago), Why: why, From: from, By: by}
	s.put(store.HistoryKey(h), h)
}

// states are the clusters of the page's examples, by their names.
var states = map[string]func(s *clusterState){
	"well":      func(*clusterState) {},
	"excepted":  func(*clusterState) {},
	"unlabeled": func(*clusterState) {},
	"exhausted": func(s *clusterState) {
		s.policy("egress-staging-web", ourIP.Next())
		s.under(store.OwnerKey(ourIP.Next()), egress.Owner{IP: ourIP.Next(), Node: "node-3", Since: s.ago(3 * time.Hour), Why: egress.ReasonClaim}, lease3)
		s.policy("egress-prod-batch")
	},
	"held-by-nobody": func(s *clusterState) {
		s.del(store.OwnerKey(ourIP))
		p := egress.Pool{Name: ourPool, Ranges: []egress.Range{{Start: ourIP, End: ourIP.Next()}}, NodeSelector: egress.Selector{MatchLabels: map[string]string{"egress": "yes"}}}
		s.put(store.PoolKey(ourPool), p)
		n := egress.Node{Name: "node-2", Index: 2, Addresses: []netip.Addr{netip.MustParseAddr("10.10.0.102")}, Labels: map[string]string{"egress": "yes"},
			PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.2.0/24")}, Capacity: 255}
		s.put(store.NodeKey("node-2"), n)
		s.put(store.CordonKey("node-2"), egress.Cordon{Node: "node-2", Since: s.ago(3 * time.Hour), Why: "operator"})
	},
	"translated-before": func(s *clusterState) {
		s.agent("node-1", lease1, func(a *egress.Agent) {
			a.Dropped = map[netip.Addr]string{ourIP: "its packets have another source when they are about to leave, and are dropped: " +
				"chain ip other-nat postrouting at priority -200 translates them first: give it a priority above -199"}
		})
	},
	"one-family": func(s *clusterState) {
		m := egress.Members{Egress: ourEgress, Node: "node-1", Pods: []egress.Member{{Pod: "prod/web-1", IPs: []netip.Addr{netip.MustParseAddr("10.244.1.5"), netip.MustParseAddr("fd44:1::5")}}},
			Blocks: []egress.Block{{IP: ourIP, First: 2048, Size: 1024, Node: "node-1", Since: s.ago(25 * time.Hour)}}}
		s.put(store.MembersByNodeKey("node-1", ourEgress), m)
		s.put(store.MembersByEgressKey(ourEgress, "node-1"), m)
	},
	"agent-down": func(s *clusterState) { s.del(store.AgentKey("node-1")) },
	"former-agent": func(s *clusterState) {
		s.agent("node-2", lease3, nil) // its lock is under another lease
	},
	"address-in-use": func(s *clusterState) {
		s.agent("node-2", lease2, func(a *egress.Agent) { a.Conflicts = map[netip.Addr]string{ourIP: "02:42:c0:a8:00:09 on link eth0"} })
	},
	"address-taken": func(s *clusterState) {
		s.del(store.OwnerKey(ourIP))
		for node, lease := range map[string]int64{"node-2": lease2, "node-3": lease3} {
			s.agent(node, lease, func(a *egress.Agent) { a.Conflicts = map[netip.Addr]string{ourIP: "02:42:c0:a8:00:09 on link eth0"} })
		}
	},
	"vlan-refused": func(s *clusterState) {
		s.put(store.PoolKey(ourPool), egress.Pool{Name: ourPool, Ranges: []egress.Range{{Start: ourIP, End: ourIP.Next()}},
			Subnet: &egress.Subnet{Gateway: netip.MustParseAddr("10.10.0.1"), PrefixLength: 24, VLAN: 100}})
		s.agent("node-3", lease3, func(a *egress.Agent) {
			a.Refused = map[string]string{ourPool: "another link on eth0 has VLAN 100: remove it, or give the pool another vlan: file exists"}
		})
	},
	"wanders": func(s *clusterState) {
		s.tenure(30*time.Hour, "node-1", egress.ReasonClaim, "", "")
		s.tenure(29*time.Hour, "node-3", egress.ReasonMove, "node-1", "alice@laptop")
		s.tenure(5*time.Hour, "node-1", egress.ReasonClaim, "", "")
		s.tenure(4*time.Hour, "", egress.ReasonRelease, "node-1", "")
		s.tenure(4*time.Hour-time.Second, "node-2", egress.ReasonClaim, "", "")
	},
	"no-ports-left": func(s *clusterState) {
		s.members("node-1", false, "prod/web-1")
		s.del(store.BlockKey(ourIP, 2048))
	},
	"ports-used": func(s *clusterState) {
		s.agent("node-1", lease1, func(a *egress.Agent) { a.Ports = map[netip.Addr]egress.PortUse{ourIP: {Want: 4096}} })
	},
	"etcd-away": func(s *clusterState) {
		s.Setenv("ETCDCTL_ENDPOINTS", "127.0.0.1:1")
		s.Setenv("ETCDCTL_DIAL_TIMEOUT", "2s")
		s.hidden["127.0.0.1:1"] = "10.0.0.1:2379"
	},
	"etcd-full": func(s *clusterState) {
		alarm := func(action pb.AlarmRequest_AlarmAction) {
			maintenance := pb.NewMaintenanceClient(s.client.Etcd().ActiveConnection())
			if _, err := maintenance.Alarm(s.Context(), &pb.AlarmRequest{Action: action, Alarm: pb.AlarmType_NOSPACE}); err != nil {
				s.Fatal(err)
			}
		}
		alarm(pb.AlarmRequest_ACTIVATE)
		s.Cleanup(func() { // the context of the test has ended by then
			if err := s.client.Disarm(s.client.Etcd().Ctx()); err != nil {
				s.Error(err)
			}
		})
	},
	"not-programmed": func(s *clusterState) {
		s.agent("node-3", lease3, func(a *egress.Agent) {
			a.Faults = map[string]string{"nftables": "applying 214 changes of nftables: operation not permitted"}
		})
	},
	"no-leader": func(s *clusterState) { s.del("elections/crdsync/1") },
	"two-versions": func(s *clusterState) {
		s.agent("node-3", lease3, func(a *egress.Agent) { a.Version, a.Since = "v1.3.2", s.ago(50*time.Hour) })
	},
	"drain-waits": func(s *clusterState) {
		s.del(store.AgentKey("node-1"))
		s.put(store.CordonKey("node-3"), egress.Cordon{Node: "node-3", Since: s.ago(3 * time.Hour), Why: "operator"})
	},
	"pinned": func(s *clusterState) { s.put(store.PinKey(ourIP), egress.Pin{IP: ourIP, Node: "node-2"}) },
	"help":   func(*clusterState) {},
}

var (
	moment   = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`)
	revision = regexp.MustCompile(`revision \d+`)
	member   = regexp.MustCompile(`etcd\d+\b`)
)

// prints returns what a person reads of a command, and its exit status where that is asked for by `; echo $?`.
func (s *clusterState) prints(command string) string {
	s.Helper()
	line, status := strings.CutSuffix(command, "; echo $?")
	args, ok := strings.CutPrefix(strings.TrimSpace(line), "egret ")
	if !ok {
		s.Errorf("%s: want an egret command", command)
	}
	var out bytes.Buffer
	c := root()
	c.SetArgs(shellWords(args))
	c.SetOut(&out)
	c.SetErr(&out)
	err := c.ExecuteContext(s.Context())
	if err != nil {
		complain(&out, err) // as main does
	}
	if n := 0; status {
		if err != nil {
			n = exitStatus(err)
		}
		fmt.Fprintln(&out, n)
	}
	text := out.String()
	for real, shown := range s.hidden {
		text = strings.ReplaceAll(text, real, shown)
	}
	text = revision.ReplaceAllString(text, "revision 4711")
	text = member.ReplaceAllString(text, "etcd-0")
	day := time.Date(2026, 1, 2, 15, 0, 0, 0, time.UTC)
	text = strings.TrimRight(text, "\n") + "\n"
	return moment.ReplaceAllStringFunc(text, func(is string) string {
		t, err := time.Parse(time.RFC3339Nano, is)
		if err != nil {
			return is
		}
		if t = day.Add(t.Sub(s.now)); strings.Contains(is, ".") {
			return t.Format("2006-01-02T15:04:05.000Z")
		}
		return t.Format("2006-01-02T15:04:05Z")
	})
}

// shellWords splits a line as a shell does that knows single quotes alone.
func shellWords(line string) (out []string) {
	for i, part := range strings.Split(line, "'") {
		if i%2 == 1 {
			out[len(out)-1] += part // what is quoted goes on with the word before it
			continue
		}
		words := strings.Fields(part)
		if i > 0 && len(words) > 0 && !strings.HasPrefix(part, " ") {
			out[len(out)-1] += words[0]
			words = words[1:]
		}
		out = append(out, words...)
	}
	return slices.Clip(out)
}
