package integration

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// full reports whether etcd has the alarm NOSPACE.
func full(t *testing.T, etcd *clientv3.Client) bool {
	t.Helper()
	list, err := etcd.AlarmList(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(list.Alarms, func(a *pb.AlarmMember) bool { return a.Alarm == pb.AlarmType_NOSPACE })
}

// TestAFullEtcdStopsNoTrafficAndCrdsyncFreesSpace raises the alarm as etcd itself does, while no crdsync runs.
func TestAFullEtcdStopsNoTrafficAndCrdsyncFreesSpace(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("full", "10.10.0.79")
	etcd := etcdClient(t)
	start := func() {
		if err := cluster.Start(context.Background(), "crdsync", ""); err != nil {
			t.Error(err)
		}
	}
	if err := cluster.Stop(t.Context(), "crdsync", ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(start)
	alarm := &pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE, Alarm: pb.AlarmType_NOSPACE, MemberID: 1}
	if _, err := pb.NewMaintenanceClient(etcd.ActiveConnection()).Alarm(t.Context(), alarm); err != nil {
		t.Fatal(err)
	}
	r := probe(t, pod, 4*time.Second, func() {
		if out, err := cluster.Egret(t.Context(), "move", ip.String(), "--to", otherNode(gateway)); err == nil || !strings.Contains(err.Error(), "space exceeded") {
			t.Errorf("a move in a full etcd: %s, %v; want that it is refused, and why", out, err)
		}
		out, err := cluster.Egret(t.Context(), "check")
		if err != nil || !strings.Contains(string(out), "NOSPACE") {
			t.Errorf("egret check says nothing of it (%v):\n%s", err, out)
		}
	})
	only(t, r, ip)
	lossless(t, "while etcd was full", r)
	r = probe(t, pod, 4*time.Second, func() {
		if err := cluster.Kill(t.Context(), "agent", gateway); err != nil {
			t.Fatal(err)
		}
		if err := cluster.Start(t.Context(), "agent", gateway); err != nil {
			t.Fatal(err)
		}
	})
	only(t, r, ip)
	t.Logf("an agent that was killed and started again in a full etcd: longest gap %v", r.LongestGap)
	if r.Tail > time.Second {
		t.Errorf("no answer any more for %v after a killed agent was started again", r.Tail)
	}

	start()
	eventually(t, 30*time.Second, func() error {
		if full(t, etcd) {
			return fmt.Errorf("the alarm is there still")
		}
		return nil
	})
	eventually(t, 10*time.Second, func() error {
		_, err := cluster.Egret(t.Context(), "move", ip.String(), "--to", otherNode(gateway))
		return err
	})
	leavesAs(t, pod, ip)
	log, err := os.ReadFile(cluster.LogFile("crdsync"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"raised NOSPACE", "NOSPACE is disarmed", "takes changes again"} {
		if !strings.Contains(string(log), want) {
			t.Errorf("crdsync's log does not say %q", want)
		}
	}
}
