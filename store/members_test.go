package store

import (
	"context"
	"crypto/tls"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/internal/etcdtest"
)

// trio gives the test an etcd of three members, and a client of all.
func trio(t *testing.T) (*etcdtest.Cluster, *Client) {
	t.Helper()
	leavesNothing(t)
	s := etcdtest.NewCluster(t, 3)
	return s, dialConfig(t, Config{Endpoints: s.Endpoints()})
}

// other returns a member that is not i.
func other(i int) int { return (i + 1) % 3 }

func TestLeaseAndLockOutliveTheLeaderOfEtcd(t *testing.T) {
	s, c := trio(t)
	l := grant(t, c, 6*time.Second)
	claim(t, c, l, owner)
	background(t, func(ctx context.Context) error { return l.Run(ctx, Keep{}) })
	lead := s.Leader()
	end := gone(t, s.Member(other(lead)).Client(), OwnerKey(ip1))
	s.Stop(lead)
	select {
	case <-end:
		t.Error("the lock is gone")
	case <-time.After(l.TTL() + 2*time.Second):
	}
	if !l.Valid().After(time.Now()) {
		t.Errorf("valid until %v ago", time.Since(l.Valid()))
	}
}

func TestAnIPIsClaimedSoonAfterTheLossOfEtcdsLeader(t *testing.T) {
	s, c := trio(t)
	l := grant(t, c, time.Minute)
	s.Stop(s.Leader())
	began := time.Now()
	for {
		ok, err := c.Claim(t.Context(), l, owner, Former{})
		if ok {
			break
		}
		if err == nil || time.Since(began) > 2*requestTimeout {
			t.Fatalf("not claimed after %v: %v", time.Since(began), err)
		}
	}
	// a request that the dead leader had is answered by nobody: requestTimeout ends it
	t.Logf("claimed after %v", time.Since(began))
}

func TestCacheLosesAndRepeatsNothingOverTheLossOfEtcdsLeader(t *testing.T) {
	s, writer := trio(t)
	log := make(lines, 100)
	c := dialConfig(t, Config{Endpoints: s.Endpoints(), Log: log.logger()})
	lead := s.Leader()
	for i := range 3 {
		if i != lead {
			s.Member(i).Cut() // so that the watches are with the leader
		}
	}
	k := tracked(t, c, OwnerPrefix, MovePrefix)
	for i := range 3 {
		s.Member(i).Mend()
	}
	took(k)

	const last = 300
	background(t, func(ctx context.Context) error {
		for n := 0; n < last; {
			key := func(prefix string) string { return writer.key(fmt.Sprintf("%s%d", prefix, n)) }
			// On the condition, since a write whose answer was lost may have been done.
			if _, err := writer.txn(ctx, []clientv3.Cmp{absent(key(OwnerPrefix))}, []clientv3.Op{
				clientv3.OpPut(key(OwnerPrefix), ""), clientv3.OpPut(key(MovePrefix), "")}, nil); err == nil {
				n++
			}
			if ctx.Err() != nil {
				break
			}
		}
		<-ctx.Done()
		return ctx.Err()
	})
	seen := map[string]bool{}
	until(t, "all that was written", k.Changed(), func() bool {
		changed, _, _ := k.take()
		for key, r := range changed {
			if r == nil || seen[key] {
				t.Errorf("%s is deleted or repeated: %v", key, r)
			}
			seen[key] = true
		}
		var n [2]int
		for key := range k.List("") {
			if n[0]++; strings.HasPrefix(key, OwnerPrefix) {
				n[1]++
			}
		}
		if n[0] != 2*n[1] {
			t.Errorf("half of a transaction: %d of %d", n[1], n[0])
		}
		if lead >= 0 && len(seen) > last/2 {
			s.Stop(lead)
			lead = -1
		}
		return len(seen) == 2*last
	})
	if lead >= 0 {
		t.Error("nothing was left to see when the leader stopped")
	}
	for len(log) > 0 {
		if line := <-log; strings.Contains(line, errRestored.Error()) {
			t.Error(line)
		} else {
			t.Log(line)
		}
	}
}

func TestWithTheMinorityOfEtcdNothingIsConfirmedClaimedOrDeleted(t *testing.T) {
	s, c := trio(t)
	l := grant(t, c, 4*time.Second)
	claim(t, c, l, owner)
	if err := c.PutAgent(t.Context(), l, agent, whatever); err != nil {
		t.Fatal(err)
	}
	background(t, func(ctx context.Context) error { return l.Run(ctx, Keep{}) }) // and is not told that it is lost
	k := tracked(t, c, OwnerPrefix, AgentPrefix)
	took(k)
	lead := s.Leader() // which does not know at first that it is alone
	s.Stop(other(lead))
	s.Stop(other(other(lead)))
	outage, cancel := context.WithTimeout(t.Context(), l.TTL()+time.Second)
	defer cancel()
	if _, err := l.Confirm(outage, agent.Node); err == nil {
		t.Error("the lease was confirmed")
	}
	second := owner
	second.IP = addr("10.0.0.99")
	if ok, err := c.Claim(t.Context(), l, second, Former{}); ok || err == nil {
		t.Errorf("claimed: %t, %v", ok, err)
	}
	<-outage.Done()
	if l.Valid().After(time.Now()) {
		t.Errorf("valid until %v", l.Valid())
	}
	if changed := took(k); len(changed) > 0 {
		t.Errorf("changed: %v", changed)
	}
	s.Start(other(lead), other(other(lead)))
	for began := time.Now(); ; {
		if _, err := l.Confirm(t.Context(), agent.Node); err == nil {
			break
		}
		if time.Since(began) > deadline {
			t.Fatal("not confirmed any more")
		}
	}
	// The claim whose answer was lost may be done by now, or is done here.
	claim(t, c, l, second)
	until(t, "the claim", k.Changed(), func() bool { return value(k, OwnerKey(second.IP)) != "" })
	if changed := took(k); !slices.Equal(changed, []string{OwnerKey(second.IP)}) {
		t.Errorf("changed: %v", changed)
	}
}

func TestClientFollowsTheReplacementOfEveryMember(t *testing.T) {
	leavesNothing(t)
	s := etcdtest.NewCluster(t, 3)
	log := make(lines, 100)
	c := dialConfig(t, Config{Endpoints: s.Endpoints(), MemberInterval: 100 * time.Millisecond, Log: log.logger()})
	l := grant(t, c, 10*time.Second)
	claim(t, c, l, owner)
	background(t, func(ctx context.Context) error { return l.Run(ctx, Keep{}) })
	k := tracked(t, c, OwnerPrefix)
	for i := range 3 {
		s.Replace(i)
		for want := s.Endpoints()[i]; !strings.Contains(recv(t, "word of the new member", log), want); {
		}
	}
	put(t, c, "owners/later", "new")
	until(t, "a change", k.Changed(), func() bool { return value(k, "owners/later") == "new" })
	if err := l.Renew(t.Context()); err != nil || value(k, OwnerKey(ip1)) == "" {
		t.Errorf("renewing: %v; owner %q", err, value(k, OwnerKey(ip1)))
	}
}

// As where one Service stands for all members: a rollout of etcd and of the agents at once stops the member that an agent
// knows soon after its start.
func TestAClientKnowsAllMembersSoonAfterItsStart(t *testing.T) {
	leavesNothing(t)
	s := etcdtest.NewCluster(t, 3)
	i := other(s.Leader())
	log := make(lines, 100)
	began := time.Now()
	c := dialConfig(t, Config{Endpoints: s.Endpoints()[i : i+1], Log: log.logger()})
	for !strings.Contains(recv(t, "word of the members", log), "members of etcd changed") {
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("the members are known %v after the start", took)
	}
	s.Stop(i)
	for range 10 {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if _, err := c.List(ctx, OwnerPrefix); err != nil {
			t.Errorf("without the member that it was told of: %v", err)
		}
		cancel()
	}
}

func TestOnlyTheSameEtcdIsAMember(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	resp, err := c.etcd.MemberList(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	id := resp.Header.ClusterId
	for endpoint, want := range map[string]bool{s.URL(): true, etcdtest.New(t).URL(): false, "http://127.0.0.1:1": false} {
		if c.answers(t.Context(), endpoint, id) != want {
			t.Errorf("%s is a member: %t", endpoint, !want)
		}
	}
}

func TestAdvertisedURLs(t *testing.T) {
	for _, tt := range []struct {
		name       string
		configured string
		tls        *tls.Config
		members    string
		want       string
	}{
		{"what is configured is not added", "10.0.0.1:2379 http://10.0.0.2:2379", nil,
			"http://10.0.0.1:2379 http://10.0.0.2:2379 http://10.0.0.3:2379", "http://10.0.0.3:2379"},
		{"no plain text beside TLS", "10.0.0.1:2379", &tls.Config{}, "http://10.0.0.3:2379 https://10.0.0.3:2381", "https://10.0.0.3:2381"},
		{"no TLS beside plain text", "http://10.0.0.1:2379", nil, "https://10.0.0.3:2379 http://10.0.0.3:2381", "http://10.0.0.3:2381"},
		{"no loopback of another machine", "[fd00::1]:2379", nil,
			"http://127.0.0.1:1 http://localhost:1 http://[::1]:1 http://0.0.0.0:1 http://[fd00::3]:1", "http://[fd00::3]:1"},
		{"a loopback beside a loopback", "localhost:2379", nil, "http://127.0.0.1:12379", "http://127.0.0.1:12379"},
		{"no loopback when one of the endpoints is none", "localhost:2379 10.0.0.1:2379", nil, "http://127.0.0.1:12379", ""},
		{"nothing beside a socket", "unix:///run/etcd", nil, "http://10.0.0.3:2379 http://127.0.0.1:1", ""},
	} {
		members := []*pb.Member{
			{Name: "a", ClientURLs: strings.Fields(tt.members)}, {Name: "new", IsLearner: true, ClientURLs: []string{"http://10.0.0.9:1"}}, {},
		}
		got := advertised(Config{Endpoints: strings.Fields(tt.configured), TLS: tt.tls}, members)
		if diff := cmp.Diff(strings.Fields(tt.want), got); diff != "" && len(got)+len(tt.want) > 0 {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}
