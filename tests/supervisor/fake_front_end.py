from tests.supervisor.fake_child import main

main("FAKE_FRONT_END")
