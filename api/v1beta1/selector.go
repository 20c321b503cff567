package v1beta1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// LabelSelector is Kubernetes' own, with its labels checked by the schema. An empty one selects all.
//
// +structType=atomic
type LabelSelector struct {
	// The webhook checks the keys: a rule of the schema could not say which one is wrong.

	// MatchLabels are labels that all have to be there.
	// +optional
	MatchLabels map[string]LabelValue `json:"matchLabels,omitempty"`
	// MatchExpressions all have to hold, besides MatchLabels.
	// +optional
	// +kubebuilder:validation:MaxItems=1000
	// +listType=atomic
	MatchExpressions []LabelSelectorRequirement `json:"matchExpressions,omitempty"`
}

// LabelValue is the value of a label.
//
// +kubebuilder:validation:MaxLength=63
// +kubebuilder:validation:Pattern=`^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?$`
type LabelValue string

// LabelSelectorRequirement is one expression about a label.
//
// +kubebuilder:validation:XValidation:rule="(self.operator in ['In', 'NotIn']) == (has(self.values) && size(self.values) > 0)",message="want values with the operators In and NotIn, and none with Exists and DoesNotExist",messageExpression="'operator ' + self.operator + (has(self.values) && size(self.values) > 0 ? ' with values [\"' + self.values[0] + (size(self.values) > 1 ? '\" ...' : '\"') + ']: want none' : ' without values: want one at least')"
type LabelSelectorRequirement struct {
	// Key is the label's name.
	// +kubebuilder:validation:MaxLength=317
	// +kubebuilder:validation:XValidation:rule="self.matches('^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$')",message="want the name of a label, like app or example.com/app"
	Key string `json:"key"`
	// Operator relates the label to the values.
	// +kubebuilder:validation:Enum=In;NotIn;Exists;DoesNotExist
	Operator metav1.LabelSelectorOperator `json:"operator"`
	// Values are those of In and NotIn.
	// +optional
	// +listType=atomic
	Values []LabelValue `json:"values,omitempty"`
}

// Kubernetes returns the selector as the libraries of Kubernetes have it; nil of nil.
func (s *LabelSelector) Kubernetes() *metav1.LabelSelector {
	if s == nil {
		return nil
	}
	out := &metav1.LabelSelector{}
	if s.MatchLabels != nil {
		out.MatchLabels = map[string]string{}
	}
	for k, v := range s.MatchLabels {
		out.MatchLabels[k] = string(v)
	}
	for _, e := range s.MatchExpressions {
		r := metav1.LabelSelectorRequirement{Key: e.Key, Operator: e.Operator}
		for _, v := range e.Values {
			r.Values = append(r.Values, string(v))
		}
		out.MatchExpressions = append(out.MatchExpressions, r)
	}
	return out
}
