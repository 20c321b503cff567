package store

import (
	"context"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
)

// watchStream is a stream of watches that withholds answers to progress requests ("how far are you?") that were made
// before the newest watch of the stream.
//
// etcd sends "watch created" and the answers to progress requests by two queues, in no order between them, and an
// answer names no watch. clientv3 takes it for one of all watches that it knows of. So the answer to a question that
// was asked before a watch was created, but comes after "created", would say of that watch that all its events up to
// the revision have been sent, though the first has yet to come: the cache would show an old record at a newer
// revision, and clientv3, should the connection then break, would never ask for these events. It happens when a range
// is added to a cache and when clientv3 sets up its watches again on a new connection.
//
// etcd handles what one stream asks in order, and answers questions in order or not at all (some watch has yet to catch
// up). So an answer is certainly of a question after the creation if its revision is higher than that of "created", or
// if as many answers as there were open questions have come since. Each answer that is withheld is followed by another
// question.
type watchStream struct {
	grpc.ClientStream
	sending sync.Mutex // SendMsg takes one caller at a time

	mu      sync.Mutex // guards what follows
	open    int        // questions that may be answered yet; those that etcd ignored are among them
	stale   int        // how many of them may have been asked before the newest watch was created
	since   int        // how many were asked after its creation was asked for
	next    int        // the same of the watch that is being created: clientv3 creates one at a time
	created int64      // the revision of etcd when the newest watch was created, at most
}

// withhold makes a watchStream of each stream of watches.
func withhold(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, stream grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := stream(ctx, desc, cc, method, opts...)
	if err != nil || method != pb.Watch_Watch_FullMethodName {
		return s, err
	}
	return &watchStream{ClientStream: s}, nil
}

func (s *watchStream) SendMsg(m any) error {
	s.sending.Lock()
	defer s.sending.Unlock()
	if r, ok := m.(*pb.WatchRequest); ok {
		s.asks(r) // before it is sent: the answer may be faster than this goroutine
	}
	return s.ClientStream.SendMsg(m)
}

func (s *watchStream) RecvMsg(m any) error {
	for {
		if err := s.ClientStream.RecvMsg(m); err != nil {
			return err
		}
		if r, ok := m.(*pb.WatchResponse); !ok || s.holds(r) {
			return nil
		}
		again := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}}
		_ = s.SendMsg(again) // of a stream that has ended, the next RecvMsg says why
	}
}

// asks counts a request.
func (s *watchStream) asks(r *pb.WatchRequest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case r.GetCreateRequest() != nil:
		s.next = 0
	case r.GetProgressRequest() != nil:
		s.open, s.since, s.next = s.open+1, s.since+1, s.next+1
	}
}

// holds reports whether a response is true of every watch that was created before it came, and counts it.
func (s *watchStream) holds(r *pb.WatchResponse) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	revision := r.GetHeader().GetRevision()
	switch {
	case r.Created:
		s.stale, s.since, s.created = s.open, s.next, max(s.created, revision)
	case r.WatchId != clientv3.InvalidWatchID || r.Canceled || len(r.Events) > 0:
	case s.stale == 0 || revision > s.created: // what was asked before the creation has been answered, or ignored
		s.open, s.stale = max(0, min(s.open, s.since)-1), 0
		return revision >= s.created
	default:
		s.open, s.stale = s.open-1, s.stale-1
		return false
	}
	return true
}
