// SPDX-License-Identifier: Apache-2.0

package impersonate

import (
	"bytes"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
	"tailscale.com/kube/kubetypes"
)

// grantRule is a grant. It has a key that Tailscale's own proxy ignores, as all that it does
// not know.
type grantRule struct {
	kubetypes.KubernetesCapRule
	Impersonate *groupsRule `json:"impersonate,omitempty"`
}

type groupsRule struct {
	kubetypes.ImpersonateRule
	// Optional holds back Groups until a request asks for them.
	Optional bool `json:"optional,omitempty"`
}

// read returns the rule that g's value means to encoding/json, which Tailscale's own
// proxy uses: letter case in keys makes no difference, unknown keys are ignored, and of
// a repeated key the last value counts. It records in g.Problems which keys are unknown
// or repeated: such a grant does not give what its author reads in it.
//
// It adds to recording what the grant says about that. There every value of a repeated
// key counts, so that none undoes an enforceRecorder.
func (g *Grant) read(recording *Recording) (rule grantRule, err error) {
	if err := decodeRule([]byte(g.Value), &rule, recording); err != nil {
		return grantRule{}, err
	}
	check, err := checkKeys([]byte(g.Value))
	if err != nil {
		return grantRule{}, err
	}
	g.Problems = check.problems
	for _, member := range check.repeated {
		if err := decodeRule(member, new(grantRule), recording); err != nil {
			return grantRule{}, err
		}
	}
	return rule, nil
}

// embedded removes what encoding/json calls embedded structs in the path of a field.
var embedded = strings.NewReplacer("KubernetesCapRule.", "", "ImpersonateRule.", "")

// decodeRule decodes text into rule, and adds to recording what it says about that.
func decodeRule(text []byte, rule *grantRule, recording *Recording) error {
	err := json.Unmarshal(text, rule)
	var wrong *json.UnmarshalTypeError
	switch {
	case errors.As(err, &wrong) && wrong.Field != "":
		field := embedded.Replace(wrong.Field)
		return fmt.Errorf("%q has %s where %s belongs", field, describeValue(wrong.Value), describeType(wrong.Type))
	case errors.As(err, &wrong):
		return fmt.Errorf("it is %s and not an object", describeValue(wrong.Value))
	case err != nil:
		return err
	}
	return recording.add(rule.KubernetesCapRule)
}

// describeValue returns what encoding/json calls a value, as users call it.
func describeValue(value string) string {
	switch value {
	case "array":
		return "a list"
	case "bool":
		return "true or false"
	case "object":
		return "an object"
	case "string":
		return "a string"
	}
	return "a number"
}

// describeType returns what a value of type t is in JSON.
func describeType(t reflect.Type) string {
	switch {
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t.Kind() == reflect.Slice:
		return "a list"
	case keysOf(t) != nil && !reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()):
		return "an object"
	}
	return "a string"
}

// keys are the keys of a JSON object, with those of the objects that are their values.
type keys map[string]keys

// ruleKeys are the keys of a grant.
var ruleKeys = keysOf(reflect.TypeFor[grantRule]())

func keysOf(t reflect.Type) keys {
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return nil
	}
	known := make(keys)
	for _, field := range reflect.VisibleFields(t) {
		if field.Anonymous {
			continue // its own fields are promoted
		}
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		known[name] = keysOf(field.Type)
	}
	return known
}

// find returns the key that name counts as.
func (k keys) find(name string) (key string, known bool) {
	for key := range k {
		if strings.EqualFold(key, name) {
			return key, true
		}
	}
	return "", false
}

// paths returns the keys, and those of the objects in them as "<key>.<key>".
func (k keys) paths() (paths []string) {
	for _, key := range slices.Sorted(maps.Keys(k)) {
		paths = append(paths, key)
		for _, inner := range k[key].paths() {
			paths = append(paths, key+"."+inner)
		}
	}
	return paths
}

// GrantProblems returns the keys in value, a value of a capability, that are unknown or
// repeated, a sentence each.
func GrantProblems(value []byte) ([]string, error) {
	check, err := checkKeys(value)
	return check.problems, err
}

func checkKeys(grant []byte) (check keyCheck, err error) {
	err = check.value(grant, ruleKeys, "")
	return check, err
}

// keyCheck looks for keys that encoding/json passes over in silence.
type keyCheck struct {
	problems []string
	// repeated are the members of the outermost object with the same key as another,
	// each as an object of its own.
	repeated [][]byte
}

// member is the last member of an object that had a key.
type member struct {
	name  string
	value []byte
}

// value checks text, the value of the key within, or a whole grant if within is empty.
func (c *keyCheck) value(text []byte, known keys, within string) error {
	decoder := jsontext.NewDecoder(bytes.NewBuffer(text), jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
	if known == nil || decoder.PeekKind() != '{' {
		return nil
	}
	if _, err := decoder.ReadToken(); err != nil {
		return err
	}
	seen := make(map[string]member)
	for decoder.PeekKind() != '}' {
		token, err := decoder.ReadToken()
		if err != nil {
			return err
		}
		name := token.String()
		value, err := decoder.ReadValue()
		if err != nil {
			return err
		}
		key, ok := known.find(name)
		if !ok {
			c.unknown(within + name)
			continue
		}
		this := member{name, bytes.Clone(value)}
		if before, again := seen[key]; again {
			c.problems = append(c.problems, fmt.Sprintf("key %q repeats %q", within+name, within+before.name))
			if within == "" {
				c.repeated = append(c.repeated, before.object(key), this.object(key))
			}
		}
		seen[key] = this
		if err := c.value(this.value, known[key], within+key+"."); err != nil {
			return err
		}
	}
	return nil
}

// object returns an object with m as its only member, under key.
func (m member) object(key string) []byte {
	return fmt.Appendf(nil, "{%q:%s}", key, m.value)
}

// unknown records that path is no key that has a meaning.
func (c *keyCheck) unknown(path string) {
	c.problems = append(c.problems, fmt.Sprintf("unknown key %q; the nearest known key is %q", path, nearest(path, ruleKeys.paths())))
}

// nearest returns the path whose last key is most like that of path.
func nearest(path string, paths []string) string {
	last := func(path string) string { return strings.ToLower(path[strings.LastIndexByte(path, '.')+1:]) }
	return slices.MinFunc(paths, func(a, b string) int {
		return distance(last(path), last(a)) - distance(last(path), last(b))
	})
}

// distance returns how many characters have to be inserted, removed or replaced to turn a
// into b.
func distance(a, b string) int {
	row := make([]int, len(b)+1) // the distances of the start of a to each start of b
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0]++
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
