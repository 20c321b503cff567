package store

import (
	"errors"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ErrRefused says that etcd does not take these changes, and will not the next time: they are too large, or not
// allowed. Nothing was written.
var ErrRefused = errors.New("refused by etcd")

// refusal adds ErrRefused to an error that the same request would get again. A full or overloaded etcd refuses nothing
// for good.
func refusal(err error) error {
	code := status.Code(err)
	if e := (rpctypes.EtcdError{}); errors.As(err, &e) {
		code = e.Code()
	}
	switch {
	case errors.Is(err, rpctypes.ErrUserEmpty): // of a request that was under way when etcd began to hold clients to roles
		return err
	case code == codes.InvalidArgument, code == codes.PermissionDenied:
	case code == codes.ResourceExhausted && !errors.Is(err, rpctypes.ErrNoSpace) && !errors.Is(err, rpctypes.ErrTooManyRequests):
	default:
		return err
	}
	return errors.Join(ErrRefused, err)
}
