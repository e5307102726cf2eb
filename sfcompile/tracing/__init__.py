"""What did happen: recorded steps of every rank, merged, as tables, pictures and Perfetto traces.

Start in trace.py (`sfcompile.trace` and SFCOMPILE_TRACE): it turns the recorder of runtime/rank on and collects the
ranks' spans. report.py puts them beside the prediction.

The room is not called trace/, since the function of that name is what people import.

May import: the leaves, runtime/program, runtime/rank, codegen/plan, passes/report and sfcompile/prediction.
"""
