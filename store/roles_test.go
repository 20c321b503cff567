package store

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
)

// parts are the users of a test, each with its role.
var parts = map[string][]Grant{"agent": AgentGrants, "crdsync": CrdsyncGrants, "operator": OperatorGrants, "cloud": CloudGrants}

func rolesOf(prefix string) (out []Role) {
	for _, part := range slices.Sorted(maps.Keys(parts)) {
		out = append(out, Role{Name: RoleName(prefix, part), Users: []string{part}, Grants: parts[part]})
	}
	return out
}

func cheapPasswords(cfg *embed.Config) { cfg.BcryptCost = 4 }

// withRoles returns an etcd that holds its clients to the roles, and the client of a user.
func withRoles(t testing.TB, s *etcdtest.Server) func(user string) Config {
	t.Helper()
	c, err := Dial(t.Context(), Config{Endpoints: []string{s.Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	changes, _, err := c.DiffRoles(t.Context(), rolesOf(DefaultPrefix))
	if err == nil {
		err = c.ChangeRoles(t.Context(), changes)
	}
	for _, user := range append(slices.Sorted(maps.Keys(parts)), "root") {
		if user != "root" { // the users of real installations have certificates
			_, e := c.etcd.UserDelete(t.Context(), user)
			err = errors.Join(err, e)
		}
		_, e := c.etcd.UserAdd(t.Context(), user, "secret")
		err = errors.Join(err, e)
		if user != "root" {
			_, e = c.etcd.UserGrantRole(t.Context(), user, RoleName(DefaultPrefix, user))
			err = errors.Join(err, e)
		}
	}
	if err := errors.Join(err, c.EnableAuth(t.Context(), "root")); err != nil {
		t.Fatal(err)
	}
	return func(user string) Config {
		return Config{Endpoints: []string{s.Endpoint()}, Username: user, Password: "secret", By: "a person", MemberInterval: time.Second}
	}
}

func newWithRoles(t *testing.T) map[string]*Client {
	t.Helper()
	leavesNothing(t)
	config := withRoles(t, etcdtest.New(t, cheapPasswords))
	out := map[string]*Client{}
	for _, user := range []string{"agent", "crdsync", "operator", "cloud", "root"} {
		out[user] = dialConfig(t, config(user))
	}
	return out
}

// TestEachPartWorksUnderItsRole walks the transactions of each part; crdsync's tests run it whole under its role.
func TestEachPartWorksUnderItsRole(t *testing.T) {
	c := newWithRoles(t)
	agent, operator, crdsync := c["agent"], c["operator"], c["crdsync"]
	must := func(what string, ok bool, err error) {
		t.Helper()
		if !ok || err != nil {
			t.Errorf("%s: %t, %v", what, ok, err)
		}
	}
	for user, grants := range parts {
		lacks, err := c[user].Lacks(t.Context(), grants)
		must(user+" lacks "+strings.Join(lacks, ", "), len(lacks) == 0, err)
	}

	lead, err := crdsync.Campaign(t.Context(), CrdsyncElection, "one", time.Minute)
	must("standing for election", lead != nil, err)
	for _, k := range []string{PoolKey("p"), EgressKey("e"), AllocationKey(ip1), IDKey(1), CounterPrefix + "ids", MembersByNodeKey("n1", "e"), MembersByEgressKey("e", "n1"),
		BlockKey(ip1, 2048), NodeKey("n1"), PodKey("n1"), ServiceKey("s"), EventRecordKey("Egress", "e"), CompactionKey, PinKey(ip1), CordonKey("n1"), SuspicionKey("n1")} {
		must("writing "+k, true, lead.Commit(t.Context(), Op{Key: k, Value: []byte("{}"), Absent: true}, Op{Key: BlockPrefix + ip1.String() + "/", Still: 1 << 40}))
	}
	must("deleting what an IP leaves", true, lead.Commit(t.Context(), Op{Key: PinKey(ip1)}, Op{Key: HistoryPrefix + ip1.String() + "/", Below: true}, Op{Key: CordonKey("n1")}))
	_, err = lead.client.List(t.Context(), "")
	must("reading everything", true, err)
	led, err := crdsync.Led(t.Context())
	must("being seen to lead", led, err)

	cloud, err := c["cloud"].Campaign(t.Context(), CloudElection, "one", time.Minute)
	must("standing for the other election", cloud != nil, err)
	must("writing down what is assigned", true, cloud.Commit(t.Context(), Op{Key: CloudKey(ip1), Value: []byte("{}"), Absent: true},
		Op{Key: OwnerKey(ip1), Still: 1 << 40}, Op{Key: AllocationKey(ip1), Exists: true}))
	for _, k := range []string{PoolPrefix, NodePrefix, OwnerPrefix, AllocationPrefix, CloudPrefix} {
		must("reading "+k, true, second(c["cloud"].List(t.Context(), k)))
	}
	must("resigning", true, cloud.Resign(t.Context()))

	view := agent.NewView("n1")
	background(t, view.Run)
	recv(t, "the view", view.Ready())
	h := prepareAs(t, agent, operator)
	suspicion := egress.Suspicion{Node: "n2", Lease: egress.FormatLease(h.lease.ID())}
	ok, err := agent.Suspect(t.Context(), suspicion, 1<<40)
	must("suspecting", ok, err)
	must("reading a suspicion", true, second(agent.Suspected(t.Context(), suspicion)))
	for range 2 { // the first time against a suspicion
		must("confirming", true, second(h.lease.Confirm(t.Context(), "n2")))
	}
	must("renewing", true, h.lease.Renew(t.Context()))
	ok, err = agent.HandOver(t.Context(), h.o, h.m, h.to)
	must("handing over", ok, err)
	must("ending a request", true, h.request.Revoke(t.Context()))
	next := grant(t, agent, time.Minute)
	must("moving to another lease", true, h.lease.MoveTo(t.Context(), next, h.to, func(netip.Addr) bool { return true }, nil))
	ok, err = agent.AskMove(t.Context(), next, h.owner(t), move)
	must("asking for a move", ok, err)
	ok, err = agent.WithdrawMove(t.Context(), h.move(t))
	must("withdrawing a move", ok, err)
	o := h.owner(t)
	ok, err = agent.Release(t.Context(), o)
	must("releasing", ok, err)
	must("claiming again", true, second(agent.Claim(t.Context(), next, egress.Owner{IP: ip1, Node: "n2"}, Former{Revision: o.Revision})))
	must("revoking the lease of a dead agent", true, agent.Revoke(t.Context(), next.ID()))
	if r := get(t, agent.etcd, OwnerKey(ip1)); r.Revision != 0 {
		t.Error("the lock outlived the lease")
	}
	_, err = agent.Space(t.Context())
	must("asking for the room in etcd", true, err)
	// egret who and egret trace, which are told to be run in the agent's pod
	_, _, err = agent.Blocks(t.Context(), ip1)
	must("reading whose ports are whose", true, err)
	_, _, err = agent.BlockHistory(t.Context(), ip1)
	must("reading whose ports were whose", true, err)
	must("reading who owned an IP", true, second(agent.History(t.Context(), ip1)))
	whole, err := agent.ReadWhole(t.Context())
	must("reading who leads", whole.Leader == "one", err)
	until(t, "the view to see the end", view.Changed(), func() bool { return len(view.Snapshot().Owners) == 0 })

	must("pinning", true, operator.Pin(t.Context(), egress.Pin{IP: ip1, Node: "n1"}))
	ok, err = operator.Unpin(t.Context(), ip1)
	must("unpinning", ok, err)
	must("cordoning", true, operator.Cordon(t.Context(), egress.Cordon{Node: "n1"}))
	ok, err = operator.Uncordon(t.Context(), "n1")
	must("uncordoning", ok, err)
	acts, _, err := operator.Acts(t.Context())
	must("reading who did what", len(acts) == 5, err)
	_, err = operator.ReadAll(t.Context())
	must("reading all", true, err)
	must("resigning", true, lead.Resign(t.Context()))
}

// prepareAs is prepare, where the move is a person's.
func prepareAs(t *testing.T, agent, operator *Client) handover {
	t.Helper()
	h := handover{c: agent, lease: grant(t, agent, time.Minute)}
	claim(t, agent, grant(t, agent, time.Minute), owner)
	h.to = egress.Agent{Node: "n2", Lease: egress.FormatLease(h.lease.ID())}
	if err := agent.PutAgent(t.Context(), h.lease, h.to, whatever); err != nil {
		t.Fatal(err)
	}
	var err error
	if h.request, err = operator.RequestMoves(t.Context(), time.Minute, move); err != nil {
		t.Fatal(err)
	}
	if ok, err := agent.Ready(t.Context(), h.move(t), h.lease); !ok || err != nil {
		t.Fatal(ok, err)
	}
	h.m, h.o = h.move(t), h.owner(t)
	return h
}

// TestNobodyWritesWhatIsNotHis tries every kind of record as every user, in each way that etcd has to change a key.
func TestNobodyWritesWhatIsNotHis(t *testing.T) {
	c := newWithRoles(t)
	writers := map[string]string{
		PoolKey("p"): "crdsync", EgressKey("e"): "crdsync", AllocationKey(ip1): "crdsync", IDKey(1): "crdsync", CounterPrefix + "ids": "crdsync",
		MembersByNodeKey("n1", "e"): "crdsync", MembersByEgressKey("e", "n1"): "crdsync", BlockKey(ip1, 2048): "crdsync", NodeKey("n1"): "crdsync",
		PodKey("n1"): "crdsync", ServiceKey("s"): "crdsync", EventRecordKey("Egress", "e"): "crdsync", CompactionKey: "crdsync", CrdsyncElection.prefix() + "1": "crdsync",
		AgentKey("n1"): "agent", OwnerKey(ip1): "agent", MoveKey(ip1): "agent operator", HistoryPrefix + ip1.String() + "/1": "agent crdsync",
		PinKey(ip1): "operator crdsync", CordonKey("n1"): "operator crdsync", ActPrefix + "1": "operator",
		CloudKey(ip1): "cloud", CloudElection.prefix() + "1": "cloud", "of-another-version/1": "",
	}
	for key := range writers {
		put(t, c["root"], key, "as it was")
	}
	if _, err := c["root"].etcd.Put(t.Context(), "/registry/secrets/1", "of others"); err != nil {
		t.Fatal(err)
	}
	for user := range parts {
		e := c[user].etcd
		for key, who := range writers {
			may, key := slices.Contains(strings.Fields(who), user), DefaultPrefix+key
			never := clientv3.Compare(clientv3.CreateRevision(DefaultPrefix), "=", 7)
			if user == "operator" || user == "crdsync" {
				never = clientv3.Compare(clientv3.CreateRevision(key), "=", 7)
			}
			for how, try := range map[string]func() error{
				"put":                      func() error { return second(e.Put(t.Context(), key, "changed")) },
				"delete":                   func() error { return second(e.Delete(t.Context(), key)) },
				"delete of a range":        func() error { return second(e.Delete(t.Context(), key, clientv3.WithRange(key+"\x00"))) },
				"transaction":              func() error { return second(e.Txn(t.Context()).Then(clientv3.OpPut(key, "changed")).Commit()) },
				"transaction's other half": func() error { return second(e.Txn(t.Context()).If(never).Else(clientv3.OpDelete(key)).Commit()) },
				"transaction in a transaction": func() error {
					return second(e.Txn(t.Context()).Then(clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpPut(key, "changed")}, nil)).Commit())
				},
				"put under another lease": func() error { return second(e.Put(t.Context(), key, "", clientv3.WithIgnoreValue())) },
			} {
				switch err := try(); {
				case may && err != nil && !errors.Is(err, rpctypes.ErrKeyNotFound):
					t.Errorf("%s of %s by the %s: %v", how, key, user, err)
				case !may && !errors.Is(err, rpctypes.ErrPermissionDenied):
					t.Errorf("%s of %s by the %s: %v, want that it is refused", how, key, user, err)
				}
			}
			if !may {
				if r, err := c["root"].etcd.Get(t.Context(), key); err != nil || len(r.Kvs) != 1 || !strings.Contains("as it was", string(r.Kvs[0].Value)) {
					t.Errorf("%s is not as it was after the %s: %v %v", key, user, r, err)
				}
			} else if _, err := c["root"].etcd.Put(t.Context(), key, "as it was"); err != nil {
				t.Fatal(err)
			}
		}
		for what, try := range map[string]func() error{
			"deletes everything":     func() error { return second(e.Delete(t.Context(), DefaultPrefix, clientv3.WithPrefix())) },
			"reads what others keep": func() error { return second(e.Get(t.Context(), "/registry/", clientv3.WithPrefix())) },
			"gives itself a role":    func() error { return second(e.UserGrantRole(t.Context(), user, "root")) },
			"makes a user":           func() error { return second(e.UserAdd(t.Context(), "mallory", "x")) },
			"ends the users":         func() error { return second(e.AuthDisable(t.Context())) },
			"widens its role": func() error {
				return second(e.RoleGrantPermission(t.Context(), RoleName(DefaultPrefix, user), "", "\x00", 2))
			},
			"reads etcd's whole content": func() error { return readSnapshot(t.Context(), e) },
			"disarms an alarm":           func() error { return second(e.AlarmDisarm(t.Context(), &clientv3.AlarmMember{MemberID: 1, Alarm: 1})) },
			"defragments":                func() error { return second(e.Defragment(t.Context(), e.Endpoints()[0])) },
		} {
			if err := try(); !errors.Is(err, rpctypes.ErrPermissionDenied) {
				t.Errorf("the %s %s: %v, want that it is refused", user, what, err)
			}
		}
	}

	// A lease that holds what is crdsync's is not an agent's to end, nor to keep alive.
	del(t, c["root"], CrdsyncElection.prefix()+"1") // it would stand first
	lead, err := c["crdsync"].Campaign(t.Context(), CrdsyncElection, "one", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	id := int64(lead.session.Lease())
	if err := c["agent"].Revoke(t.Context(), id); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Errorf("an agent ends crdsync's election: %v", err)
	}
	if _, err := c["agent"].etcd.Put(t.Context(), DefaultPrefix+OwnerKey(ip1), "x", clientv3.WithLease(clientv3.LeaseID(id))); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Errorf("an agent ties a lock to crdsync's lease: %v", err)
	}
	// And who names no user is nobody.
	nobody := Config{Endpoints: c["agent"].etcd.Endpoints()}
	if n, err := Dial(t.Context(), nobody); err == nil || !strings.Contains(err.Error(), "--user") {
		t.Errorf("without a user: %v, want an error that names the remedy", err)
		if n != nil {
			n.Close()
		}
	}
}

// Agents share a role. One of its own for each node, which writes the record of that node alone, could not end the lease
// of a dead one: etcd asks for the right to write all that is under it. And a lock is one key, which whoever takes an IP
// writes.
func TestWhoEndsTheLeaseOfADeadNodeHasToBeAllowedToWriteItsRecord(t *testing.T) {
	leavesNothing(t)
	s := etcdtest.New(t, cheapPasswords)
	config := withRoles(t, s)
	root, dead := dialConfig(t, config("root")), dialConfig(t, config("agent"))
	lease := grant(t, dead, time.Minute)
	if err := dead.PutAgent(t.Context(), lease, egress.Agent{Node: "n1"}, 0); err != nil {
		t.Fatal(err)
	}
	write := func(key string) {
		t.Helper()
		if _, err := root.etcd.RoleGrantPermission(t.Context(), "n2", DefaultPrefix+key, "", clientv3.PermissionType(clientv3.PermReadWrite)); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []func() error{
		func() error { return second(root.etcd.RoleAdd(t.Context(), "n2")) },
		func() error { return second(root.etcd.UserAdd(t.Context(), "n2", "secret")) },
		func() error { return second(root.etcd.UserGrantRole(t.Context(), "n2", "n2")) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	write("")
	write(AgentKey("n2"))
	other := dialConfig(t, config("n2"))
	if err := other.Revoke(t.Context(), lease.ID()); !errors.Is(err, rpctypes.ErrPermissionDenied) {
		t.Errorf("by who writes its own record alone: %v, want that it is refused", err)
	}
	write(AgentKey("n1"))
	if err := other.Revoke(t.Context(), lease.ID()); err != nil {
		t.Errorf("by who writes the dead one's: %v", err)
	}
}

func readSnapshot(ctx context.Context, e *clientv3.Client) error {
	r, err := e.Snapshot(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = r.Read(make([]byte, 1))
	return err
}

func TestRolesAreMadeOnceAndMended(t *testing.T) {
	c := dial(t, start(t))
	diff := func(roles []Role) (out []string) {
		t.Helper()
		changes, more, err := c.DiffRoles(t.Context(), roles)
		if err == nil {
			err = c.ChangeRoles(t.Context(), changes)
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, change := range changes {
			out = append(out, change.Etcdctl)
		}
		return append(out, more...)
	}
	first := diff(rolesOf(DefaultPrefix))
	for _, want := range []string{
		"role add egret-agent", "role grant-permission --prefix=true egret-agent readwrite /egret/owners/", "role grant-permission egret-agent read /egret/",
		"user add agent --no-password", "user grant-role agent egret-agent", "role grant-permission egret-crdsync readwrite /egret/compaction",
	} {
		if !slices.Contains(first, want) {
			t.Errorf("%q is not among %q", want, first)
		}
	}
	if again := diff(rolesOf(DefaultPrefix)); len(again) > 0 {
		t.Errorf("what is there is changed: %q", again)
	}
	// Somebody gave an agent too much, and took from it what it needs.
	for _, err := range []error{
		second(c.etcd.RoleGrantPermission(t.Context(), "egret-agent", "/egret/allocations/", clientv3.GetPrefixRangeEnd("/egret/allocations/"), clientv3.PermissionType(clientv3.PermReadWrite))),
		second(c.etcd.RoleGrantPermission(t.Context(), "egret-agent", "/egret/", clientv3.GetPrefixRangeEnd("/egret/"), clientv3.PermissionType(clientv3.PermReadWrite))),
		second(c.etcd.RoleRevokePermission(t.Context(), "egret-agent", "/egret/owners/", clientv3.GetPrefixRangeEnd("/egret/owners/"))),
		second(c.etcd.RoleAdd(t.Context(), "wide")), second(c.etcd.UserGrantRole(t.Context(), "agent", "wide")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	want := []string{
		"role grant-permission --prefix=true egret-agent read /egret/allocations/", "role grant-permission --prefix=true egret-agent readwrite /egret/owners/",
		`role revoke-permission egret-agent "/egret/" "/egret0"`, "agent: wide",
	}
	changes, _, err := c.DiffRoles(t.Context(), rolesOf(DefaultPrefix))
	if err != nil || len(changes) != 3 || !changes[0].Narrows || changes[1].Narrows || !changes[2].Narrows {
		t.Errorf("%+v, %v: want that the first and the last of three take rights away", changes, err)
	}
	if d := cmp.Diff(want, diff(rolesOf(DefaultPrefix))); d != "" {
		t.Errorf("mended (-want +got):\n%s", d)
	}
	// Another Egret in the same etcd has roles of its own.
	if other := diff(rolesOf("/egret/b/")); !slices.Contains(other, "role add egret-b-agent") {
		t.Errorf("%q", other)
	}
	want = []string{"agent: egret-b-agent, wide", "cloud: egret-b-cloud", "crdsync: egret-b-crdsync", "operator: egret-b-operator"}
	if d := cmp.Diff(want, diff(rolesOf(DefaultPrefix))); d != "" {
		t.Errorf("the first is touched (-want +got):\n%s", d)
	}
}
