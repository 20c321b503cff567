package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

const (
	// statusTimeout is what a member may take to say how it is: it answers in a millisecond unless it stands still.
	statusTimeout = 2 * time.Second
	// spaceTimeout bounds a compaction and the defragmentation of a member: 0.2 s and 1 s for 100 MB on two busy cores.
	spaceTimeout = time.Minute
)

// Member is a member of etcd, as it says of itself. Sizes are in bytes.
type Member struct {
	ID       uint64
	Name     string
	Endpoint string
	Leads    bool
	Size     int64 // of its database
	InUse    int64 // what of Size holds something; a defragmentation gives the rest back
	Quota    int64 // what Size may be before the alarm NOSPACE is raised; 0: not known, as of an etcd before 3.6
}

// String says how full the member is, for a person.
func (m Member) String() string {
	quota := "what --quota-backend-bytes says"
	if m.Quota != 0 {
		quota = Megabytes(m.Quota)
	}
	return fmt.Sprintf("member %s has %s, %s of it in use, and may have %s", m.Name, Megabytes(m.Size), Megabytes(m.InUse), quota)
}

// Megabytes returns a number of bytes as text.
func Megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/(1<<20)) }

// Space is how much room etcd has.
type Space struct {
	Members  []Member // by name; those that answered
	Count    int      // of all members
	Revision int64    // the newest
	NoSpace  bool     // the alarm NOSPACE is raised: nothing is written
	// Fault is why not all members are well, nil: they are. One that does not answer, is not reached by any endpoint,
	// or learns, is not. Of a Client that is Relayed it is about the member that answered.
	Fault error
}

// Space asks every member of etcd. An error says that nothing is known; see also Space.Fault.
func (c *Client) Space(ctx context.Context) (Space, error) {
	try, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	list, err := retryElsewhere(try, time.Second, func(ctx context.Context) (*clientv3.MemberListResponse, error) { return c.etcd.MemberList(ctx) })
	if err != nil {
		return Space{}, fmt.Errorf("listing the members of etcd: %w", err)
	}
	endpoints := c.etcd.Endpoints()
	answers := make([]Space, len(endpoints))
	var wg sync.WaitGroup
	for i, e := range endpoints {
		wg.Go(func() { answers[i] = c.spaceAt(ctx, e) })
	}
	wg.Wait()
	s := Space{Count: len(list.Members)}
	for _, m := range list.Members {
		var is *Member
		for _, a := range answers {
			s.Revision = max(s.Revision, a.Revision)
			s.NoSpace = s.NoSpace || a.NoSpace
			if len(a.Members) > 0 && a.Members[0].ID == m.ID {
				is = &a.Members[0]
				is.Name = m.Name
			}
		}
		switch {
		case m.IsLearner:
			s.Fault = errors.Join(s.Fault, fmt.Errorf("member %s learns", m.Name))
		case is == nil && c.relayed:
		case is == nil:
			s.Fault = errors.Join(s.Fault, fmt.Errorf("member %s does not answer at any of %q", m.Name, endpoints))
		default:
			s.Members = append(s.Members, *is)
		}
	}
	if c.relayed && len(s.Members) == 0 {
		s.Fault = errors.Join(s.Fault, fmt.Errorf("no member answers at %q", endpoints))
	}
	slices.SortFunc(s.Members, func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
	return s, nil
}

// spaceAt asks the member behind one endpoint; no Members: it does not answer, or not as one that is well.
func (c *Client) spaceAt(ctx context.Context, endpoint string) Space {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	conn, err := c.etcd.Dial(endpoint)
	if err != nil {
		return Space{}
	}
	defer conn.Close()
	status, err := pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{}, grpc.WaitForReady(false))
	if err != nil {
		return Space{}
	}
	s := Space{Revision: status.Header.Revision, NoSpace: noSpace(status)}
	// A member that is being defragmented still says how it is; a read waits.
	if _, err = pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(c.prefix), CountOnly: true}); err == nil && status.Leader != 0 {
		id := status.Header.MemberId
		s.Members = []Member{{
			ID: id, Endpoint: endpoint, Leads: status.Leader == id, Size: status.DbSize, InUse: status.DbSizeInUse, Quota: status.DbSizeQuota,
		}}
	}
	return s
}

// noSpace reports whether a member knows the alarm. Unlike the list of alarms, a status goes through no log of raft.
func noSpace(status *pb.StatusResponse) bool {
	return slices.ContainsFunc(status.Errors, func(e string) bool { return strings.Contains(e, pb.AlarmType_NOSPACE.String()) })
}

// Compact has etcd drop what the keys were before a revision; what they are at it, and since, stays. It is of all keys,
// those of others too. It returns when the room is free. done is false when somebody did that already, as etcd itself
// does with --auto-compaction-retention.
func (c *Client) Compact(ctx context.Context, revision int64) (done bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, spaceTimeout)
	defer cancel()
	if _, err := c.etcd.Compact(ctx, revision, clientv3.WithCompactPhysical()); errors.Is(err, rpctypes.ErrCompacted) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("compacting to revision %d: %w", revision, err)
	}
	return true, nil
}

// Defragment has a member give the room back that its database does not use. The member answers nothing meanwhile;
// where it is the only one, neither does etcd.
func (c *Client) Defragment(ctx context.Context, m Member) error {
	ctx, cancel := context.WithTimeout(ctx, spaceTimeout)
	defer cancel()
	fail := func(err error) error { return fmt.Errorf("defragmenting member %s: %w", m.Name, err) }
	conn, err := c.etcd.Dial(m.Endpoint)
	if err != nil {
		return fail(err)
	}
	defer conn.Close()
	client := pb.NewMaintenanceClient(conn)
	status, err := client.Status(ctx, &pb.StatusRequest{})
	if err != nil {
		return fail(err)
	}
	if status.Header.MemberId != m.ID { // a load balancer's
		return fail(fmt.Errorf("%s leads to another one", m.Endpoint))
	}
	if _, err := client.Defragment(ctx, &pb.DefragmentRequest{}); err != nil {
		return fail(err)
	}
	return nil
}

// Disarm takes back the alarm NOSPACE of every member, and no other alarm.
func (c *Client) Disarm(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	list, err := c.etcd.AlarmList(ctx)
	if err != nil {
		return fmt.Errorf("listing the alarms of etcd: %w", err)
	}
	for _, a := range list.Alarms {
		if a.Alarm != pb.AlarmType_NOSPACE {
			continue
		}
		if _, err := c.etcd.AlarmDisarm(ctx, &clientv3.AlarmMember{MemberID: a.MemberID, Alarm: a.Alarm}); err != nil {
			return fmt.Errorf("disarming NOSPACE: %w", err)
		}
	}
	c.reportFull(false)
	return nil
}

// NoSpace reports whether the alarm NOSPACE was raised when etcd was last asked, once in Config.MemberInterval, or
// refused a change.
func (c *Client) NoSpace() bool { return c.full.Load() }

// AskNoSpace asks now. Where etcd does not answer within half a second, what it said last counts.
func (c *Client) AskNoSpace(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	status, err := retryElsewhere(ctx, 100*time.Millisecond, func(ctx context.Context) (*pb.StatusResponse, error) {
		return pb.NewMaintenanceClient(c.etcd.ActiveConnection()).Status(ctx, &pb.StatusRequest{})
	})
	if err == nil { // that etcd does not answer is logged elsewhere
		c.reportFull(noSpace(status))
	}
	return c.NoSpace()
}

// reportFull logs when the alarm is raised, and when it is gone.
func (c *Client) reportFull(full bool) {
	if c.full.Swap(full) == full {
		return
	}
	if full {
		c.log.Error("etcd has raised NOSPACE and takes nothing but deletions: no egress IP gets another owner, no new pod is known; make room in it")
	} else {
		c.log.Info("etcd takes changes again")
	}
}
