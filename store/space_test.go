package store

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
)

// small gives etcd a quota that a test can fill.
func small(cfg *embed.Config) { cfg.QuotaBackendBytes = 4 << 20 }

// fill writes until etcd raises NOSPACE. What it leaves is history, but for a megabyte at most.
func fill(t *testing.T, c *clientv3.Client) {
	t.Helper()
	value := string(bytes.Repeat([]byte("x"), 256<<10))
	for range 100 {
		if _, err := c.Put(t.Context(), "/others/key", value); errors.Is(err, rpctypes.ErrNoSpace) {
			return
		} else if err != nil {
			t.Fatalf("filling etcd: %v", err)
		}
	}
	t.Fatal("etcd is not full")
}

func TestAFullEtcdKeepsLeasesAndAnswersButTakesNoClaim(t *testing.T) {
	leavesNothing(t)
	s := etcdtest.New(t, small)
	said := make(lines, 100)
	c := dialConfig(t, Config{Endpoints: []string{s.Endpoint()}, MemberInterval: 50 * time.Millisecond, Log: said.logger()})
	l := grant(t, c, time.Minute)
	claim(t, c, l, owner)
	if err := c.PutAgent(t.Context(), l, egress.Agent{Node: owner.Node, Since: time.Now()}, whatever); err != nil {
		t.Fatal(err)
	}
	other := grant(t, c, 60*time.Second)
	fill(t, s.Client())

	for what, try := range map[string]func() error{
		"renewing a lease":   func() error { return l.Renew(t.Context()) },
		"confirming a lease": func() error { _, err := l.Confirm(t.Context(), owner.Node); return err },
		"adopting a lease":   func() error { _, err := c.Adopt(t.Context(), l.ID()); return err },
		"reading":            func() error { _, err := c.List(t.Context(), OwnerPrefix); return err },
		"revoking a lease":   func() error { return other.Revoke(t.Context()) },
	} {
		if err := try(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, try := range map[string]func() error{
		"granting a lease": func() error { _, err := c.Grant(t.Context(), time.Second); return err },
		"claiming":         func() error { o := owner; o.IP = ip2; _, err := c.Claim(t.Context(), l, o, Former{}); return err },
	} {
		if err := try(); !errors.Is(err, rpctypes.ErrNoSpace) {
			t.Errorf("%s: %v, want that there is no space", what, err)
		}
	}
	if line := recv(t, "a line of the log", said); !strings.Contains(line, "NOSPACE") || !strings.Contains(line, "ERROR") || !c.NoSpace() {
		t.Errorf("the log says %q first, and NoSpace %t; want NOSPACE, true", line, c.NoSpace())
	}

	// As an operator does it.
	space, err := c.Space(t.Context())
	if err != nil || !space.NoSpace || len(space.Members) != 1 || space.Members[0].Quota != 4<<20 {
		t.Fatalf("space %+v, %v: want the alarm, and one member with its quota", space, err)
	}
	if done, err := c.Compact(t.Context(), space.Revision); !done || err != nil {
		t.Errorf("compacting: %t, %v", done, err)
	}
	if done, err := c.Compact(t.Context(), space.Revision); done || err != nil {
		t.Errorf("compacting what is compacted: %t, %v; want nothing done, and no error", done, err)
	}
	if err := errors.Join(c.Defragment(t.Context(), space.Members[0]), c.Disarm(t.Context())); err != nil {
		t.Fatal(err)
	}
	if line := recv(t, "a line of the log", said); !strings.Contains(line, "takes changes again") {
		t.Errorf("the log says %q then", line)
	}
	after, err := c.Space(t.Context())
	if err != nil || after.NoSpace || after.Members[0].Size > space.Members[0].Size/2 {
		t.Errorf("space %+v, %v: want no alarm, and less than half of %d bytes", after, err, space.Members[0].Size)
	}
	o := owner
	o.IP = ip2
	claim(t, c, l, o)
}

func TestDisarmLeavesOtherAlarmsAlone(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	raise := func(a pb.AlarmType) {
		t.Helper()
		conn := s.Client().ActiveConnection()
		if _, err := pb.NewMaintenanceClient(conn).Alarm(t.Context(), &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, Alarm: a, MemberID: 1}); err != nil {
			t.Fatal(err)
		}
	}
	raise(pb.AlarmType_CORRUPT)
	raise(pb.AlarmType_NOSPACE)
	if err := c.Disarm(t.Context()); err != nil {
		t.Fatal(err)
	}
	list, err := s.Client().AlarmList(t.Context())
	if err != nil || len(list.Alarms) != 1 || list.Alarms[0].Alarm != pb.AlarmType_CORRUPT {
		t.Errorf("alarms %v, %v; want CORRUPT alone", list, err)
	}
}

func TestSpaceNamesTheMemberThatIsNotWell(t *testing.T) {
	cluster, c := trio(t)
	space, err := c.Space(t.Context())
	if err != nil || space.Fault != nil || len(space.Members) != 3 {
		t.Fatalf("space %+v, %v: want three members, all well", space, err)
	}
	leads := 0
	for i, m := range space.Members {
		if m.Name != fmt.Sprintf("etcd%d", i+1) || m.Size == 0 || m.InUse == 0 {
			t.Errorf("member %+v", m)
		}
		if m.Leads {
			leads++
		}
	}
	if leads != 1 {
		t.Errorf("%d members lead", leads)
	}
	stuck := other(cluster.Leader())
	relayed := dialConfig(t, Config{Endpoints: cluster.Endpoints()[cluster.Leader():][:1], MemberInterval: time.Hour, Relayed: true})
	cluster.Member(stuck).Freeze()
	defer cluster.Member(stuck).Mend()
	if space, err := relayed.Space(t.Context()); err != nil || space.Fault != nil || space.Count != 3 || len(space.Members) != 1 {
		t.Errorf("by a way to one member: space %+v, %v: want three members, and nothing said of those that cannot be asked", space, err)
	}
	space, err = c.Space(t.Context())
	if want := fmt.Sprintf("etcd%d does not answer", stuck+1); err != nil || space.Fault == nil || !strings.Contains(space.Fault.Error(), want) {
		t.Errorf("space %+v, %v: want that %s", space, err, want)
	}
}

func TestAUserWithoutTheRoleRootSeesTheSpaceAndMakesNone(t *testing.T) {
	leavesNothing(t)
	s := etcdtest.New(t, func(cfg *embed.Config) { cfg.BcryptCost = 4 }) // a password's check is not what is tested
	ctx, etcd := t.Context(), s.Client()
	for _, step := range []func() error{
		func() error { _, err := etcd.UserAdd(ctx, "root", "secret"); return err },
		func() error { _, err := etcd.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := etcd.UserAdd(ctx, "egret", "secret"); return err },
		func() error { _, err := etcd.RoleAdd(ctx, "egret"); return err },
		func() error {
			all := clientv3.GetPrefixRangeEnd(DefaultPrefix)
			_, err := etcd.RoleGrantPermission(ctx, "egret", DefaultPrefix, all, clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error { _, err := etcd.UserGrantRole(ctx, "egret", "egret"); return err },
		func() error { _, err := etcd.AuthEnable(ctx); return err },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	c := dialConfig(t, Config{Endpoints: []string{s.Endpoint()}, Username: "egret", Password: "secret", DialTimeout: deadline})
	space, err := c.Space(ctx)
	if err != nil || space.Fault != nil || len(space.Members) != 1 {
		t.Fatalf("space %+v, %v: want one member, well", space, err)
	}
	grant(t, c, time.Second)
	put(t, c, "egresses/a", egress.Policy{Name: "a"})
	if space, err = c.Space(ctx); err != nil {
		t.Fatal(err)
	}
	_, compacting := c.Compact(ctx, space.Revision)
	for _, err := range []error{compacting, c.Defragment(ctx, space.Members[0])} {
		if !strings.Contains(fmt.Sprint(err), "permission denied") {
			t.Errorf("error %v, want that it is not permitted", err)
		}
	}
}
