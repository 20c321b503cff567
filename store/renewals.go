package store

import (
	"context"
	"errors"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// An answer may take elsewhereAfter until another member of etcd is asked, and twice as long each time that one took
// longer, up to elsewhereLatest: an etcd that is only slow gets no more to do by that.
const (
	elsewhereAfter  = 200 * time.Millisecond
	elsewhereLatest = 2 * time.Second
	// elsewhereEvery is how often a renewal goes to another member all the same, or the next one after that.
	elsewhereEvery = 5 * time.Second
)

// errRenewals says that a stream of renewals has ended, or does not answer.
var errRenewals = errors.New("the stream of renewals has ended")

// renewals is one stream for all renewals of a lease: one for each costs etcd and the agent several times as much. What
// goes wrong, or takes too long, ends the stream, so that no answer is of an earlier question; the next renewal opens
// another one. It is not safe for concurrent use.
type renewals struct {
	lease   *Lease
	after   time.Duration                 // how long the next answer may take, where there is another member to ask
	other   time.Time                     // when another member was last asked for one, or the first renewal was
	stream  pb.Lease_LeaseKeepAliveClient // nil: none is open
	end     context.CancelFunc
	answers chan *pb.LeaseKeepAliveResponse // closed when the stream has ended
}

// ask renews the lease once. An error says that this is not known, unless it is rpctypes.ErrLeaseNotFound.
func (r *renewals) ask(ctx context.Context) (*pb.LeaseKeepAliveResponse, error) {
	// A member whose disk hangs passes renewals on and knows of nothing new, so that a watch of it seems to have missed
	// nothing: the others are asked, too.
	now := time.Now()
	if r.other.IsZero() {
		r.other = now
	}
	if now.Sub(r.other) >= elsewhereEvery && len(r.lease.client.etcd.Endpoints()) > 1 {
		r.other = now
		return nil, errRenewals
	}
	if r.stream == nil {
		if err := r.open(ctx); err != nil {
			return nil, err
		}
	}
	if err := r.stream.Send(&pb.LeaseKeepAliveRequest{ID: r.lease.ID()}); err != nil {
		r.close()
		return nil, err
	}
	late := time.NewTimer(r.lease.client.elsewhere(r.after))
	defer late.Stop()
	select {
	case a, open := <-r.answers:
		if !open {
			break
		}
		r.after = max(r.after/2, elsewhereAfter)
		if a.TTL <= 0 {
			return nil, rpctypes.ErrLeaseNotFound
		}
		return a, nil
	case <-late.C:
		r.after = min(2*r.after, elsewhereLatest)
	case <-ctx.Done():
	}
	r.close()
	return nil, errRenewals
}

// open opens a stream that outlives ctx.
func (r *renewals) open(ctx context.Context) error {
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	opening := context.AfterFunc(ctx, end) // where there is no connection, this waits for one
	stream, err := pb.NewLeaseClient(r.lease.client.etcd.ActiveConnection()).LeaseKeepAlive(life)
	if !opening() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		end()
		return err
	}
	answers := make(chan *pb.LeaseKeepAliveResponse, 1)
	r.stream, r.end, r.answers = stream, end, answers
	go func() { // it ends with the stream
		defer close(answers)
		for {
			a, err := stream.Recv()
			if err != nil {
				return
			}
			select {
			case answers <- a:
			case <-life.Done():
				return
			}
		}
	}()
	return nil
}

// close ends the stream, if one is open.
func (r *renewals) close() {
	if r.stream == nil {
		return
	}
	r.end()
	for range r.answers { // until its goroutine has ended
	}
	r.stream = nil
}
