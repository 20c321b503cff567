package bundle

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/tarball"
	"github.com/egret-project/egret/store"
)

var (
	ip    = netip.MustParseAddr("10.10.0.11")
	podIP = netip.MustParseAddr("10.244.1.5")
)

func dial(t *testing.T, server *etcdtest.Server, change func(*store.Config)) *store.Client {
	t.Helper()
	cfg := store.Config{Endpoints: []string{server.Endpoint()}}
	if change != nil {
		change(&cfg)
	}
	c, err := store.Dial(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func put(t *testing.T, c *store.Client, all map[string]any) {
	t.Helper()
	for key, record := range all {
		value, err := store.Encode(record)
		if text, ok := record.(string); ok {
			value = []byte(text)
		}
		if err == nil {
			_, err = c.Etcd().Put(t.Context(), c.Prefix()+key, string(value))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// cluster is a record of each kind, of a cluster in which an egress has no address.
func cluster() map[string]any {
	now := time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
	block := egress.Block{IP: ip, First: 2048, Size: 1024, Node: "worker-7", Since: now}
	members := egress.Members{Egress: "payments", Node: "worker-7", Pods: []egress.Member{{Pod: "shop/checkout-1", IPs: []netip.Addr{podIP}}}, Blocks: []egress.Block{block}}
	by := "alice@laptop (certificate CN=alice)"
	tenure := egress.Tenure{IP: ip, Node: "gateway-3", Since: now, Why: egress.ReasonMove, From: "worker-7", By: by}
	act := egress.Act{What: egress.ActCordon, Node: "worker-7", By: by, Since: now}
	return map[string]any{
		store.PoolKey("public"): egress.Pool{Name: "public", Ranges: []egress.Range{{Start: ip, End: ip.Next()}},
			NodeSelector: egress.Selector{MatchLabels: map[string]string{"example.com/team": "treasury"}}},
		store.EgressKey("payments"):                      egress.Policy{Name: "payments", Addresses: []egress.Address{{IP: ip, ID: 1, Pool: "public"}}},
		store.EgressKey("backoffice"):                    egress.Policy{Name: "backoffice"},
		store.AllocationKey(ip):                          egress.Allocation{IP: ip, Pool: "public", ID: 1, Egresses: []string{"payments"}},
		store.IDKey(1):                                   egress.IDRecord{ID: 1, IP: ip},
		store.MembersByNodeKey("worker-7", "payments"):   members,
		store.MembersByEgressKey("payments", "worker-7"): members,
		store.BlockKey(ip, 2048):                         block,
		store.NodeKey("worker-7"): egress.Node{Name: "worker-7", Index: 1, Addresses: []netip.Addr{netip.MustParseAddr("10.7.7.7")},
			Labels: map[string]string{"example.com/team": "treasury", "kubernetes.io/os": "linux", "kubernetes.io/hostname": "worker-7"}},
		store.NodeKey("gateway-3"):     egress.Node{Name: "gateway-3", Index: 2, Addresses: []netip.Addr{netip.MustParseAddr("10.7.7.3")}},
		store.ServiceKey("kubernetes"): egress.ServiceCIDR{Name: "kubernetes", CIDRs: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}},
		store.PodKey("worker-7"):       egress.PodRanges{Node: "worker-7", CIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}},
		store.AgentKey("gateway-3"): egress.Agent{Node: "gateway-3", Address: netip.MustParseAddr("10.7.7.3"), MAC: "02:e9:aa:bb:cc:dd", Version: "v1.2.3", Lease: "a1",
			Faults:  map[string]string{"routes": "to 10.7.7.7 by worker-7: EPERM"},
			Refused: map[string]string{"public": "VLAN 100 is eth0.100's"}, Conflicts: map[netip.Addr]string{ip: "02:aa:bb:cc:dd:ee on eth0"}},
		store.OwnerKey(ip):                         egress.Owner{IP: ip, Node: "gateway-3", Why: egress.ReasonMove, From: "worker-7"},
		store.MoveKey(ip):                          egress.Move{IP: ip, To: "worker-7", By: by},
		store.PinKey(ip):                           egress.Pin{IP: ip, Node: "gateway-3"},
		store.CordonKey("worker-7"):                egress.Cordon{Node: "worker-7", Why: "operator"},
		store.SuspicionKey("worker-7"):             egress.Suspicion{Node: "worker-7", Lease: "a2", By: "gateway-3", Since: now},
		store.HistoryKey(tenure):                   tenure,
		store.ActKey(act):                          act,
		store.EventRecordKey("Egress", "payments"): map[string]any{"uid": "u-1", "changes": 2, "nodes": map[string]string{ip.String(): "gateway-3"}},
		store.CounterPrefix + "ids":                map[string]int{"last": 1},
		store.PermitKey:                            egress.Permits{Longest: egress.Duration(time.Second)},
		store.CompactionKey:                        map[string]any{"revisions": []map[string]any{{"revision": 5, "at": now}}},
		electionPrefix + "694d":                    "crdsync-55",
	}
}

// private are the names of cluster, and what its addresses begin with: each so long that hardly an address of 10.0.0.0/8,
// which stays one of it, gets another one by chance that begins so.
var private = []string{"worker-7", "gateway-3", "payments", "backoffice", "public", "shop", "checkout", "alice", "laptop", "treasury", "example.com", "crdsync-55",
	"10.10.0.1", "10.244.1.", "10.7.7.", "aa:bb:cc"}

// bundled makes an archive, and returns its files without the folder.
func bundled(t *testing.T, cfg Config) (Manifest, map[string]string) {
	t.Helper()
	var packed bytes.Buffer
	m, err := Write(t.Context(), cfg, &packed)
	if err != nil {
		t.Fatal(err)
	}
	place := regexp.MustCompile(`^egret-bundle/([a-z]+/)?[a-z0-9-]+\.(txt|json|jsonl)$`)
	files := tarball.Files(t, &packed, folder, func(h *tar.Header) {
		if !place.MatchString(h.Name) || h.Typeflag != tar.TypeReg || h.Mode != 0o600 || h.Linkname != "" {
			t.Errorf("%q, type %c, mode %o, is no file of the archive's layout", h.Name, h.Typeflag, h.Mode)
		}
	})
	var told Manifest
	if err := json.Unmarshal([]byte(files["manifest.json"]), &told); err != nil || len(told.Files) != len(m.Files) {
		t.Errorf("manifest.json: %v\n%s", err, files["manifest.json"])
	}
	for _, f := range m.Files {
		if len(files[f.Name]) != f.Bytes {
			t.Errorf("%s has %d bytes, the manifest says %d", f.Name, len(files[f.Name]), f.Bytes)
		}
	}
	return m, files
}

func TestABundleHoldsWhatThereIsAndNoSecret(t *testing.T) {
	server := etcdtest.New(t)
	c := dial(t, server, nil)
	put(t, c, cluster())
	const secret = "hunter22"
	put(t, c, map[string]any{
		"registry/secrets/default/token":          secret, // where etcd is shared, and the prefix names too much
		"pools/../../../../etc/cron.d/x":          secret,
		"egresses/../../../../root/.ssh/evil":     `{"name":"../../../../root/.ssh/evil","created":"2026-01-02T12:00:00Z"}`,
		"nodes/..":                                `{"name":"..","index":3}`,
		store.PinKey(ip.Next()):                   `{"ip":"10.10.0.12","node":"gateway-3","password":"` + secret + `"}`,
		store.CordonKey("gateway-3"):              egress.Cordon{Node: "gateway-3", Why: "\x1b]0;owned\x07 -----BEGIN PRIVATE KEY-----\nMHcCAQ " + secret},
		store.EgressKey("the-password-is-in-why"): egress.Policy{Name: "the-password-is-in-why"},
	})
	m, files := bundled(t, Config{Client: c, Endpoints: []string{"https://root:" + secret + "@" + server.Endpoint()}, Version: "v9", Hide: []string{"topsecret"}})
	for name, text := range files {
		for _, bad := range []string{secret, "MHcCAQ", "\x1b", "\x07", "registry/secrets"} {
			// A password in a free text is found only where it is the one that etcd was asked with: here it stands
			// behind a key.
			if strings.Contains(text, bad) && !(bad == secret && strings.Contains(name, "cordons")) {
				t.Errorf("%s has %q in it:\n%s", name, bad, text)
			}
		}
	}
	for key := range cluster() {
		found := slices.ContainsFunc(kinds, func(k kind) bool { return strings.Contains(files["records/"+k.file+".jsonl"], `"key":"`+key+`"`) })
		if !found {
			t.Errorf("record %s is not there", key)
		}
	}
	for name, want := range map[string]string{
		"records/egresses.jsonl":  `"key":"egresses/../../../../root/.ssh/evil"`,
		"records/pools.jsonl":     `"note":"it is no such record: the value is left out"`,
		"records/pins.jsonl":      `"note":"fields that this version does not know are left out"`,
		"records/elections.jsonl": `"value":"crdsync-55"`,
		"etcd/members.json":       `"Quota"`,
		"etcd/alarms.json":        "[]",
		"etcd/others.txt":         "1 keys below /egret/ are none of Egret's, and were not read",
		"status.txt":              "egress backoffice: it has no address",
		"status.json":             `"level": "broken"`,
		"tables/agents.txt":       "v1.2.3",
		"describe/001.txt":        "$ egret describe ",
		"manifest.json":           `"egret": "v9"`,
	} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s: %q is not in\n%s", name, want, files[name])
		}
	}
	// What cannot be read is told, and keeps nothing else away.
	var failed []string
	for _, f := range m.Failed() {
		failed = append(failed, f.Name)
	}
	if !slices.Contains(failed, "tables/pools.txt") || !strings.Contains(files["tables/pools.txt"], "public") || slices.Contains(failed, "status.txt") {
		t.Errorf("failed are %v; want the table of pools, of which one could not be read, and not the status\n%s", failed, files["tables/pools.txt"])
	}
	again, _ := bundled(t, Config{Client: c})
	for i, f := range again.Files {
		if f.Name != m.Files[i].Name {
			t.Errorf("file %d is %s, and %s the next time", i, m.Files[i].Name, f.Name)
		}
	}
}

func TestARedactedBundleHasNoNameAndNoAddress(t *testing.T) {
	server := etcdtest.New(t)
	c := dial(t, server, nil)
	put(t, c, cluster())
	put(t, c, map[string]any{"pins/worker-9.internal": "no JSON"})
	m, files := bundled(t, Config{Client: c, Redact: true, Endpoints: []string{server.Endpoint()}})
	if len(files) < 30 {
		t.Fatalf("%d files: %+v", len(files), m)
	}
	for name, text := range files {
		for _, bad := range append(private, "worker-9") {
			if i := strings.Index(text, bad); i >= 0 {
				t.Errorf("%s: %q is left: ...%s...", name, bad, text[max(0, i-60):min(len(text), i+60)])
			}
		}
	}
	// Who is who can be told still.
	value := func(file string, into any) {
		t.Helper()
		line, _, _ := strings.Cut(files["records/"+file+".jsonl"], "\n")
		if err := json.Unmarshal([]byte(line), &struct {
			Value any `json:"value"`
		}{into}); err != nil {
			t.Fatalf("%s: %v\n%s", file, err, line)
		}
	}
	var owner egress.Owner
	var policy egress.Allocation
	var members egress.Members
	var history egress.Tenure
	var suspicion egress.Suspicion
	value("suspicions", &suspicion)
	value("owners", &owner)
	value("allocations", &policy)
	value("members-by-node", &members)
	value("history", &history)
	if owner.IP != policy.IP || owner.Node == "" || owner.From != members.Node || members.Egress != policy.Egresses[0] || history.Node != owner.Node || suspicion.By != owner.Node || suspicion.Node != members.Node ||
		!strings.HasPrefix(owner.Node, "NODE") || !strings.HasPrefix(history.By, "PERSON") || !strings.HasPrefix(members.Pods[0].Pod, "NAMESPACE") {
		t.Errorf("owner %+v, allocation %+v, members %+v, history %+v: want the same names for the same things", owner, policy, members, history)
	}
	if !strings.Contains(files["status.txt"], owner.Node) || !strings.Contains(files["tables/owners.txt"], owner.IP.String()) {
		t.Errorf("other names in the texts:\n%s\n%s", files["status.txt"], files["tables/owners.txt"])
	}
	if nodes := files["records/nodes.jsonl"]; !strings.Contains(nodes, `"kubernetes.io/os":"linux"`) {
		t.Errorf("what means the same everywhere is replaced, too: %s", nodes)
	}
	if _, err := Write(t.Context(), Config{Redact: true, Unreached: errors.New("no answer")}, io.Discard); err == nil || !strings.Contains(err.Error(), "--redact") {
		t.Errorf("without etcd: %v; want that it is refused, since names are not known", err)
	}
}

// An agent's own user of etcd may read a part alone.
func TestWhatEtcdRefusesIsReportedAndTheRestIsThere(t *testing.T) {
	server := etcdtest.New(t, func(cfg *embed.Config) { cfg.BcryptCost = 4 })
	c := dial(t, server, nil)
	put(t, c, cluster())
	e := c.Etcd()
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	add := func(user, role string) {
		t.Helper()
		_, err := e.UserAdd(t.Context(), user, "pass-word")
		do(err)
		_, err = e.RoleAdd(t.Context(), role)
		do(err)
		_, err = e.UserGrantRole(t.Context(), user, role)
		do(err)
	}
	add("root", "root")
	add("part", "part")
	for _, key := range []string{"/egret/owners/", "/egret/nodes/"} {
		_, err := e.RoleGrantPermission(t.Context(), "part", key, clientv3.GetPrefixRangeEnd(key), clientv3.PermissionType(clientv3.PermRead))
		do(err)
	}
	_, err := e.RoleGrantPermission(t.Context(), "part", "/egret/", "", clientv3.PermissionType(clientv3.PermRead))
	do(err)
	_, err = e.AuthEnable(t.Context())
	do(err)
	part := dial(t, server, func(cfg *store.Config) { cfg.Username, cfg.Password = "part", "pass-word" })
	m, files := bundled(t, Config{Client: part, Hide: []string{"pass-word"}})
	if !strings.Contains(files["records/owners.jsonl"], "gateway-3") || files["records/pools.jsonl"] != "" {
		t.Errorf("owners %q, pools %q", files["records/owners.jsonl"], files["records/pools.jsonl"])
	}
	i := slices.IndexFunc(m.Files, func(f File) bool { return f.Name == "records/pools.jsonl" })
	if i < 0 || !strings.Contains(m.Files[i].Error, "permission denied") {
		t.Errorf("the manifest does not say why there are no pools: %+v", m.Files)
	}
	if _, err := Write(t.Context(), Config{Client: part, Redact: true}, io.Discard); err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("redacted: %v; want that it is refused", err)
	}
}

func TestABundleEndsInTimeWhateverEtcdDoes(t *testing.T) {
	server := etcdtest.New(t)
	c := dial(t, server, nil)
	put(t, c, cluster())
	server.Freeze()
	began := time.Now()
	m, files := bundled(t, Config{Client: c, Timeout: 2 * time.Second})
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("took %v", took)
	}
	if m.Collected() || len(m.Failed()) < 20 || files["manifest.json"] == "" {
		t.Errorf("%+v", m)
	}
	if m, _ := bundled(t, Config{Unreached: errors.New("no answer of etcd")}); len(m.Failed()) != 1 || !strings.Contains(m.Failed()[0].Error, "no answer of etcd") {
		t.Errorf("without a client: %+v", m)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Write(ctx, Config{Client: c}, io.Discard); err != nil {
		t.Errorf("interrupted: %v; want what there is", err)
	}
	if _, err := Write(t.Context(), Config{}, full{}); err == nil {
		t.Error("a full disk is no error")
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("no space left on device") }

// Records that are more than a file takes go on in others, and each is of whole lines. There are more than a page of
// etcd's answers, too.
func TestManyRecordsAreSeveralFiles(t *testing.T) {
	server := etcdtest.New(t)
	c := dial(t, server, nil)
	const nodes = page + 100
	var ops []clientv3.Op
	for i := range nodes {
		name := fmt.Sprintf("node-%d", i)
		v, err := store.Encode(egress.Node{Name: name, Index: i + 1, Labels: map[string]string{"a": strings.Repeat("x", 50)}})
		if err != nil {
			t.Fatal(err)
		}
		ops = append(ops, clientv3.OpPut("/egret/"+store.NodeKey(name), string(v)))
	}
	for some := range slices.Chunk(ops, 100) {
		if _, err := c.Etcd().Txn(t.Context()).Then(some...).Commit(); err != nil {
			t.Fatal(err)
		}
	}
	_, files := bundled(t, Config{Client: c, chunk: 32 << 10})
	seen, parts := map[string]bool{}, 0
	for name, text := range files {
		if !strings.HasPrefix(name, "records/nodes") {
			continue
		}
		if parts++; len(text) > 32<<10 {
			t.Errorf("%s has %d bytes", name, len(text))
		}
		for line := range strings.Lines(text) {
			var r struct {
				Value egress.Node `json:"value"`
			}
			if err := json.Unmarshal([]byte(line), &r); err != nil || len(r.Value.Labels) != 1 {
				t.Fatalf("%s: %v: %.100s", name, err, line)
			}
			seen[r.Value.Name] = true
		}
	}
	if len(seen) != nodes || parts < 3 {
		t.Errorf("%d records in %d files", len(seen), parts)
	}
}
