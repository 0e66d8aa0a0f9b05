// SPDX-License-Identifier: Apache-2.0

package kubetest

import (
	"encoding/xml"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/onsi/ginkgo/v2/reporters"
	"github.com/onsi/ginkgo/v2/types"
)

// The states that a test of these reports can be in.
const (
	pass    = types.SpecStatePassed
	fail    = types.SpecStateFailed
	skip    = types.SpecStateSkipped
	timeout = types.SpecStateTimedout
	panics  = types.SpecStatePanicked
	stopped = types.SpecStateInterrupted
)

// spec returns the report of a test, as Ginkgo makes it.
func spec(name string, state types.SpecState, message string) types.SpecReport {
	return types.SpecReport{
		LeafNodeType: types.NodeTypeIt, LeafNodeText: name, State: state,
		Failure: types.Failure{Message: message},
	}
}

// write writes a JUnit file as Kubernetes' tests do, with Ginkgo's own writer.
func write(t *testing.T, report types.Report) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "junit_01.xml")
	config := reporters.JunitReportConfig{
		OmitTimelinesForSpecState: types.SpecStatePassed | types.SpecStateSkipped,
		OmitFailureMessageAttr:    true,
		OmitSpecLabels:            true,
	}
	if err := reporters.GenerateJUnitReportWithConfig(report, path, config); err != nil {
		t.Fatal(err)
	}
	return path
}

// read writes and reads a report with these tests.
func read(t *testing.T, specs ...types.SpecReport) Report {
	t.Helper()
	report, err := ReadReport(write(t, types.Report{SpecReports: specs}))
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func TestReadReport_SaysWhatBecameOfEachTest(t *testing.T) {
	report := read(t,
		spec("[sig-cli] passes", pass, ""),
		spec("[sig-cli] fails", fail, "no answer\nwithin 5 s"),
		spec("[sig-cli] panics", panics, "nil"),
		spec("[sig-cli] takes too long", timeout, "a timeout occurred"),
		spec("[sig-cli] is stopped", stopped, "interrupted"),
		spec("[sig-cli] skips itself", skip, "needs two nodes"),
		spec("[sig-cli] was not chosen", skip, ""),
		types.SpecReport{LeafNodeType: types.NodeTypeSynchronizedBeforeSuite, State: pass},
	)
	want := map[string]Result{
		"[sig-cli] passes":         {Outcome: Passed},
		"[sig-cli] fails":          {Failed, "no answer"},
		"[sig-cli] panics":         {Outcome: Failed},
		"[sig-cli] takes too long": {Failed, "a timeout occurred"},
		"[sig-cli] is stopped":     {Failed, "interrupted"},
		"[sig-cli] skips itself":   {Skipped, "needs two nodes"},
	}
	for name, w := range want {
		got := report.Results[name]
		if got.Outcome != w.Outcome || !strings.Contains(got.Reason, w.Reason) {
			t.Errorf("%s: got %+v, want %+v", name, got, w)
		}
	}
	if len(report.Results) != len(want) {
		t.Errorf("got results of %q", slices.Sorted(maps.Keys(report.Results)))
	}
}

func TestReadReport_RefusesWhatSaysNothing(t *testing.T) {
	good := spec("[sig-cli] passes", pass, "")
	for name, report := range map[string]types.Report{
		"no test ran": {SpecReports: types.SpecReports{spec("[sig-cli] skips itself", skip, "needs two nodes"), spec("[sig-cli] was not chosen", skip, "")}},
		"failed as a whole: Suite Timeout Elapsed": {SpecReports: types.SpecReports{good, spec("[sig-cli] came too late", skip, "timeout")}, SpecialSuiteFailureReasons: []string{"Suite Timeout Elapsed"}},
		"two results": {SpecReports: types.SpecReports{good, good}},
		"[SynchronizedBeforeSuite] failed": {SpecReports: types.SpecReports{good, {
			LeafNodeType: types.NodeTypeSynchronizedBeforeSuite, State: fail, Failure: types.Failure{Message: "no node is ready"},
		}}},
	} {
		if _, err := ReadReport(write(t, report)); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := ReadReport(filepath.Join(t.TempDir(), "none.xml")); !os.IsNotExist(err) {
		t.Errorf("a file that is not there: got %v", err)
	}
	cut := filepath.Join(t.TempDir(), "cut.xml")
	if err := os.WriteFile(cut, []byte("<testsuites><testsuite>"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadReport(cut); err == nil {
		t.Error("a file that was cut off is a report")
	}
}

// A file of a Ginkgo that names its entries in another way must not look like one in which
// nothing failed.
func TestReadReport_RefusesEntriesWithoutStatus(t *testing.T) {
	path := filepath.Join(t.TempDir(), "junit_01.xml")
	content, err := xml.Marshal(reporters.JUnitTestSuites{TestSuites: []reporters.JUnitTestSuite{{
		TestCases: []reporters.JUnitTestCase{{Name: "[It] passes", Status: "passed"}, {Name: "[It] has no status"}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadReport(path); err == nil || !strings.Contains(err.Error(), "no status") {
		t.Errorf("got %v", err)
	}
}

func TestCompare_FindsWhatThePluginBreaks(t *testing.T) {
	known := map[string]string{"known": "no DNS in the lab"}
	for _, tt := range []struct {
		name            string
		test            string
		direct, through *types.SpecReport
		want            string
	}{
		{"passes both ways", "a", new(spec("a", pass, "")), new(spec("a", pass, "")), "both"},
		{"fails through the plugin", "a", new(spec("a", pass, "")), new(spec("a", fail, "403")), "lost"},
		{"takes too long through the plugin", "a", new(spec("a", pass, "")), new(spec("a", timeout, "")), "lost"},
		{"skips itself through the plugin", "a", new(spec("a", pass, "")), new(spec("a", skip, "no exec")), "lost"},
		{"did not run through the plugin", "a", new(spec("a", pass, "")), nil, "lost"},
		{"ran only through the plugin", "a", nil, new(spec("a", pass, "")), "lost"},
		{"skips itself directly", "a", new(spec("a", skip, "local")), new(spec("a", pass, "")), "lost"},
		{"skips itself both ways", "a", new(spec("a", skip, "local")), new(spec("a", skip, "local")), "skip"},
		{"fails both ways", "a", new(spec("a", fail, "x")), new(spec("a", fail, "x")), "unknown"},
		{"fails directly", "a", new(spec("a", fail, "x")), new(spec("a", pass, "")), "unknown"},
		{"fails both ways, as known", "known", new(spec("known", fail, "x")), new(spec("known", fail, "x")), "known"},
		{"passes through the plugin, as known", "known", new(spec("known", fail, "x")), new(spec("known", pass, "")), "known"},
		{"known, and passes", "known", new(spec("known", pass, "")), new(spec("known", pass, "")), "both stale"},
		{"known, passes, and is lost", "known", new(spec("known", pass, "")), new(spec("known", fail, "")), "lost stale"},
	} {
		// Another test, as a report in which none ran is an error.
		direct, through := []types.SpecReport{spec("other", pass, "")}, []types.SpecReport{spec("other", pass, "")}
		if tt.direct != nil {
			direct = append(direct, *tt.direct)
		}
		if tt.through != nil {
			through = append(through, *tt.through)
		}
		c := Compare("set", read(t, direct...), read(t, through...), known)
		var got []string
		for kind, pairs := range map[string][]Pair{"both": c.Both, "lost": c.Lost, "skip": c.Skip, "unknown": c.Unknown, "known": c.Known, "stale": c.Stale} {
			if slices.ContainsFunc(pairs, func(p Pair) bool { return p.Test == tt.test }) {
				got = append(got, kind)
			}
		}
		slices.Sort(got)
		if s := strings.Join(got, " "); s != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, s, tt.want)
		}
		wantErr := strings.Contains(tt.want, "lost") || tt.want == "unknown"
		if err := c.Err(); (err != nil) != wantErr {
			t.Errorf("%s: got error %v", tt.name, err)
		}
		if wantErr && !strings.Contains(c.Details(), "\n  "+tt.test+"\n") {
			t.Errorf("%s: the details do not name the test:\n%s", tt.name, c.Details())
		}
	}
}

func TestCompare_TestsThatPassWhenRunAgainAreNamed(t *testing.T) {
	direct := read(t, spec("a", pass, ""), spec("b [x]", pass, ""), spec("c", timeout, ""), spec("d", pass, ""))
	through := read(t, spec("a", pass, ""), spec("b [x]", timeout, ""), spec("c", pass, ""), spec("d", fail, ""))
	c := Compare("set", direct, through, nil)
	again := c.RunAgain()
	if want := []string{`b \[x\]$`, "d$", "c$"}; again == nil || !slices.Equal(again.Focus, want) {
		t.Fatalf("runs again %+v, want %q", again, want)
	}
	second := []types.SpecReport{spec("b [x]", pass, ""), spec("c", pass, ""), spec("d", pass, "")}
	failing := []types.SpecReport{spec("b [x]", pass, ""), spec("c", pass, ""), spec("d", fail, "")}
	c.Merge(Compare(again.Name, read(t, second...), read(t, failing...), nil))
	names := func(pairs []Pair) string {
		var all []string
		for _, p := range pairs {
			all = append(all, p.Test)
		}
		return strings.Join(all, " ")
	}
	if names(c.Again) != "b [x] c" || names(c.Lost) != "d" || len(c.Unknown) != 0 || c.Err() == nil {
		t.Errorf("got %+v", c)
	}
	if !strings.Contains(c.Details(), "run again") {
		t.Errorf("the details do not say what was run again:\n%s", c.Details())
	}
	if c := Compare("set", direct, direct, map[string]string{"c": "slow"}); c.RunAgain() != nil {
		t.Errorf("runs again %+v without need", c.RunAgain())
	}
}

func TestTable_CountsEachTestOnce(t *testing.T) {
	direct := read(t, spec("a", pass, ""), spec("b", pass, ""), spec("c", fail, ""), spec("d", fail, ""), spec("e", skip, "x"))
	through := read(t, spec("a", pass, ""), spec("b", fail, ""), spec("c", fail, ""), spec("d", pass, ""), spec("e", skip, "x"))
	c := Compare("sig-x", direct, through, map[string]string{"c": "known"})
	want := "| sig-x | 4 | 1 | 1 | 2 | 1 | 0 s | 0 s |\n"
	if table := Table([]Comparison{c}); !strings.HasSuffix(table, want) {
		t.Errorf("got\n%s\nwant as its last line\n%s", table, want)
	}
}

func TestKnownFailures_HaveReasons(t *testing.T) {
	if _, err := KnownFailures(); err != nil {
		t.Error(err)
	}
	for name, file := range map[string]string{
		"needs a test and a reason": "- test: a\n",
		"twice":                     "- {test: a, reason: b}\n- {test: a, reason: c}\n",
		"unknown field":             "- {test: a, because: b}\n",
	} {
		if _, err := parseKnown([]byte(file)); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
