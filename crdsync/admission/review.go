package admission

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"

	admissionv1 "k8s.io/api/admission/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/crdsync/spec"
	"github.com/egret-project/egret/egress"
)

// maxReview bounds a review: the API server takes objects of 3 MB, and sends the old one and the new one.
const maxReview = 8 << 20

// maxTold bounds what is said of an object, in bytes: it quotes the object, which is anybody's to bring.
const maxTold = 4 << 10

// reviewer answers AdmissionReviews of version v1.
type reviewer struct {
	// with those that cannot be read, and why
	pools func(context.Context) (map[string]egress.Pool, map[string]error, error)
	inUse func(context.Context) ([]egress.Allocation, error)
	log   *slog.Logger
	// frank says that who asks has shown an API server's certificate: the answer goes to a user who may write the object,
	// and names what other objects have that are in its way.
	frank bool
	// reviewed is as Config's.
	reviewed func(verdict string)
}

func (r *reviewer) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	verdict := "failed"
	defer func() {
		if r.reviewed != nil {
			r.reviewed(verdict)
		}
	}()
	var review admissionv1.AdmissionReview
	body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, maxReview))
	if err == nil {
		err = json.Unmarshal(body, &review)
	}
	if err == nil && review.Request == nil {
		err = errors.New("it has no request")
	}
	if err != nil {
		http.Error(w, fmt.Sprintf("reading the AdmissionReview: %.200v", err), http.StatusBadRequest)
		return
	}
	whole(req.Context(), w.Header())
	wrong, err := r.review(req.Context(), review.Request)
	if err != nil {
		r.log.Warn("an object could not be checked", "err", fmt.Errorf("%.100q %.300q: %w", review.Request.Resource.Resource, review.Request.Name, err))
		text := "it cannot be told now whether the object is right: crdsync's log says why"
		if r.frank {
			text = err.Error()
		}
		http.Error(w, text, http.StatusInternalServerError)
		return
	}
	answer := admissionv1.AdmissionReview{TypeMeta: review.TypeMeta}
	answer.Response = &admissionv1.AdmissionResponse{UID: review.Request.UID, Allowed: wrong == nil}
	verdict = "allowed"
	if wrong != nil {
		verdict = "refused"
		text := spec.Brief(wrong)
		if r.frank {
			text = wrong.Error()
		}
		if len(text) > maxTold {
			text = strings.ToValidUTF8(text[:maxTold], "") + " and more"
		}
		answer.Response.Result = &metav1.Status{
			Status: metav1.StatusFailure, Code: http.StatusUnprocessableEntity, Reason: metav1.StatusReasonInvalid, Message: text,
		}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer) // the API server has gone: it has its own log
}

// review returns what is wrong with an object. err: that is not known.
func (r *reviewer) review(ctx context.Context, req *admissionv1.AdmissionRequest) (wrong, err error) {
	switch {
	case req.Operation != admissionv1.Create && req.Operation != admissionv1.Update:
		return nil, nil
	case req.Resource.Group != v1beta1.GroupVersion.Group || req.SubResource != "":
		return nil, nil
	case req.Resource.Resource == v1beta1.EgressResource.Resource:
		return r.egress(ctx, req.Object.Raw, req.OldObject.Raw)
	case req.Resource.Resource == v1beta1.PoolResource.Resource:
		return r.pool(ctx, req.Object.Raw, req.OldObject.Raw)
	}
	return nil, nil
}

func (r *reviewer) egress(ctx context.Context, object, old []byte) (wrong, err error) {
	var e, before v1beta1.Egress
	if err := json.Unmarshal(object, &e); err != nil {
		return fmt.Errorf("reading the Egress: %w", err), nil
	}
	if json.Unmarshal(old, &before) == nil && equality.Semantic.DeepEqual(e.Spec, before.Spec) || e.DeletionTimestamp != nil {
		return nil, nil
	}
	ips, names, err1 := spec.Addresses(e.Spec)
	_, err2 := spec.Bandwidth(e.Spec.Bandwidth)
	_, _, err3 := spec.AppliedTo(e.Spec.AppliedTo)
	errs := []error{err1, err2, err3}
	if len(names) > 0 {
		pools, unread, err := r.pools(ctx)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if unread[name] != nil {
				return errors.Join(errs...), nil // its addresses are not known
			}
		}
		for _, ip := range ips {
			_, err := spec.PoolOf(ip, names, pools)
			errs = append(errs, err)
		}
		errs = append(errs, spec.Families(names, pools))
	}
	return errors.Join(errs...), nil
}

func (r *reviewer) pool(ctx context.Context, object, old []byte) (wrong, err error) {
	var e, before v1beta1.ExternalIPPool
	if err := json.Unmarshal(object, &e); err != nil {
		return fmt.Errorf("reading the ExternalIPPool: %w", err), nil
	}
	if json.Unmarshal(old, &before) == nil && equality.Semantic.DeepEqual(e.Spec, before.Spec) || e.DeletionTimestamp != nil {
		return nil, nil
	}
	to, wrong := spec.Pool(e.Name, e.Spec)
	if wrong != nil {
		return wrong, nil
	}
	from, err := spec.Pool(before.Name, before.Spec)
	if err != nil {
		from = egress.Pool{Name: e.Name}
	}
	pools, _, err := r.pools(ctx)
	if err != nil {
		return nil, err
	}
	used, err := r.inUse(ctx)
	if err != nil {
		return nil, err
	}
	return errors.Join(spec.Overlap(spec.Added(from, to), pools), spec.TakenAway(from, to, used)), nil
}
